/* inference/jinja_run.h: what jinja_run.c, jinja_eval.c and jinja_operators.c share. */
#ifndef HT_INFERENCE_JINJA_RUN_H
#define HT_INFERENCE_JINJA_RUN_H

#include "inference/jinja_impl.h"

// jinja_operators.c
enum ht_status ht_jrun_arithmetic(struct ht_jrun *r, int op, struct ht_jv a, struct ht_jv b,
                                  struct ht_jv *out);

// jinja_run.c
enum ht_status ht_jrun_look_up(struct ht_jrun *r, struct ht_jscope *s,
                               const struct ht_jstring *name, struct ht_jv *out);

// jinja_eval.c
enum ht_status ht_jrun_arguments(struct ht_jrun *r, struct ht_jscope *s, const struct ht_jnode *n,
                                 struct ht_jargs *a);
enum ht_status ht_jrun_eval(struct ht_jrun *r, struct ht_jscope *s, const struct ht_jnode *n,
                            struct ht_jv *out);

#endif
