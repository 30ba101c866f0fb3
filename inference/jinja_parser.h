/* inference/jinja_parser.h: what jinja_parse.c, jinja_expression.c and jinja_nodes.c share. */
#ifndef HT_INFERENCE_JINJA_PARSER_H
#define HT_INFERENCE_JINJA_PARSER_H

#include "inference/jinja_impl.h"

struct ht_jparser {
    struct ht_jinja *t;
    const struct ht_jtoken *tok; // the next token
    int64_t n_nodes;
    int depth, loops, macros;
};

// jinja_nodes.c
enum ht_status ht_jparse_fail(const struct ht_jparser *p, const char *what, const char *p2,
                              size_t n2);
enum ht_status ht_jparse_unexpected(const struct ht_jparser *p, const char *wanted);
enum ht_status ht_jparse_node(struct ht_jparser *p, struct ht_jnode **out, enum ht_jnode_kind kind);
/* Operators make trees that are deep without nesting: heights are bounded, for rendering recurses.
 */
enum ht_status ht_jparse_over(struct ht_jparser *p, struct ht_jnode *n,
                              const struct ht_jnode *child);
enum ht_status ht_jparse_add(struct ht_jparser *p, struct ht_jnode *list, struct ht_jnode *item);
bool ht_jparse_is_op(const struct ht_jparser *p, int op);
bool ht_jparse_is_word(const struct ht_jparser *p, const char *word);
bool ht_jparse_take_op(struct ht_jparser *p, int op);
bool ht_jparse_take_word(struct ht_jparser *p, const char *word);
enum ht_status ht_jparse_want_op(struct ht_jparser *p, int op);
enum ht_status ht_jparse_want(struct ht_jparser *p, enum ht_jtoken_kind kind, const char *what);
enum ht_status ht_jparse_string(struct ht_jparser *p, const struct ht_jstring **out,
                                const char *text, size_t n);
enum ht_status ht_jparse_name(struct ht_jparser *p, const struct ht_jstring **out);
/* Escapes of Python's "unicode-escape". */
enum ht_status ht_jparse_unescape(struct ht_jparser *p, const struct ht_jstring **out,
                                  const char *s, size_t n);
#define HT_JPARSE_FAIL(p, what) ht_jparse_fail((p), (what), NULL, 0)

// jinja_expression.c
/* out = kind over a. */
enum ht_status ht_jparse_wrap(struct ht_jparser *p, struct ht_jnode **out, enum ht_jnode_kind kind,
                              struct ht_jnode *a);
enum ht_status ht_jparse_one_filter(struct ht_jparser *p, struct ht_jnode **e);
enum ht_status ht_jparse_logic(struct ht_jparser *p, struct ht_jnode **out,
                               enum ht_jnode_kind kind);
enum ht_status ht_jparse_expression(struct ht_jparser *p, struct ht_jnode **out);
/* "a, b" without parentheses is a tuple. */
enum ht_status ht_jparse_tuple(struct ht_jparser *p, struct ht_jnode **out);
/* What for and set assign to: a name, a tuple of names, or (set) namespace.attribute. */
enum ht_status ht_jparse_target(struct ht_jparser *p, struct ht_jnode **out, bool attributes);

#endif
