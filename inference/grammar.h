/* inference/grammar.h: answers that are JSON, or JSON of a schema, by construction [11].
 *
 * A schema becomes rules over bytes, a pushdown automaton whose stacks are shared; sets of stacks
 * that are met become states with a table of 256 successors, made when first needed. The tokens
 * allowed in a state are found by walking the sorted vocabulary through these tables, and
 * remembered. What is generated is always valid; some valid texts are not generated (white space is
 * at most one newline and 16 blanks, properties come in the schema's order, numbers have at most 16
 * digits).
 *
 * Schemas: type, enum, const, properties, required, additionalProperties, items, prefixItems,
 * minItems, maxItems, minLength, maxLength, anyOf, oneOf (any of them), allOf of one, $ref within
 * the schema (recursion too), true. Other keywords that restrict values (pattern, minimum, ..) are
 * refused by name; annotations (title, format, ..) are skipped.
 */
#ifndef HT_INFERENCE_GRAMMAR_H
#define HT_INFERENCE_GRAMMAR_H

#include <stdbool.h>
#include <stdint.h>

#include <jansson.h>

#include "data/tokenizer.h"

/* A vocabulary sorted by bytes; read-only after creation, for many grammars and threads. */
struct ht_grammar_vocab;
/* eos: allowed where the text may end; -1: none, then the grammar ends the text by allowing
 * nothing. */
enum ht_status ht_grammar_vocab_create(struct ht_grammar_vocab **out, const struct ht_tokenizer *t,
                                       int64_t vocab_size, int32_t eos);
void ht_grammar_vocab_free(struct ht_grammar_vocab *v); // after its grammars

struct ht_grammar; // where one text is; not for two threads at once

/* Any JSON object; or what the schema says. HT_ERR_ARG names the keyword that is not supported. */
enum ht_status ht_grammar_create_json(struct ht_grammar **out, const struct ht_grammar_vocab *v);
enum ht_status ht_grammar_create_schema(struct ht_grammar **out, const struct ht_grammar_vocab *v,
                                        const json_t *schema);
enum ht_status ht_grammar_clone(struct ht_grammar **out,
                                const struct ht_grammar *g); // for forks; same thread as g
void ht_grammar_free(struct ht_grammar *g);

/* Logits (vocab_size) of tokens that may not come next become -inf. HT_ERR_MEMORY: the text is
 * nested too deep. */
enum ht_status ht_grammar_mask(struct ht_grammar *g, float *logits);
bool ht_grammar_allows(struct ht_grammar *g, int32_t id);
/* The token was chosen. HT_ERR_ARG when it was not allowed; g is unchanged then. */
enum ht_status ht_grammar_accept(struct ht_grammar *g, int32_t id);
bool ht_grammar_may_end(const struct ht_grammar *g); // the text so far is whole
bool ht_grammar_must_end(struct ht_grammar *g);      // and nothing but its end may follow

#endif
