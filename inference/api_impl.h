/* inference/api_impl.h: what api_parse.c, api_tokenize.c and api_fields.c share. */
#ifndef HT_INFERENCE_API_IMPL_H
#define HT_INFERENCE_API_IMPL_H

#include "inference/api.h"

void ht_api_bad(struct ht_api_error *e, int http, const char *param);
const char *ht_api_type_name(const json_t *j);
/* NULL when the key is missing or null. */
json_t *ht_api_get(const json_t *o, const char *key);
enum ht_status ht_api_get_bool(const json_t *o, const char *key, bool *out, struct ht_api_error *e);
/* A number without fraction counts as an integer; high values are clipped when `clip`. */
enum ht_status ht_api_get_int(const json_t *o, const char *key, int64_t low, int64_t high,
                              bool clip, int64_t *out, struct ht_api_error *e);
/* low and high belong to the range unless `open`: then low does not. */
enum ht_status ht_api_get_real(const json_t *o, const char *key, double low, double high, bool open,
                               float *out, struct ht_api_error *e);
enum ht_status ht_api_get_string(const json_t *o, const char *key, const char **out,
                                 struct ht_api_error *e);
enum ht_status ht_api_add_text(struct ht_ids *ids, const json_t *text, bool special,
                               const struct ht_api_context *c, struct ht_api_error *e);
enum ht_status ht_api_add_ids(struct ht_ids *ids, const json_t *list,
                              const struct ht_api_context *c, const char *param,
                              struct ht_api_error *e);

/* A failure that is the client's: param may be NULL. */
#define HT_API_BAD(e, p, ...) (ht_api_bad((e), 400, (p)), HT_FAIL(HT_ERR_ARG, __VA_ARGS__))

#endif
