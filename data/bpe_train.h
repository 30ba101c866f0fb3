/* data/bpe_train.h: learning a byte-level BPE vocabulary from text (Sennrich et al. 2016).
 *
 * Text is cut into words by the style's pattern, words are counted, then the most frequent adjacent
 * pair is merged again and again (ties: the smaller pair of ids, as Hugging Face's trainer does, so
 * that both learn the same merges). Ids: special tokens, the 256 byte characters by code point,
 * then merges in order.
 */
#ifndef HT_DATA_BPE_TRAIN_H
#define HT_DATA_BPE_TRAIN_H

#include <stddef.h>
#include <stdint.h>

#include "core/base/status.h"

enum ht_bpe_style { HT_BPE_GPT2, HT_BPE_LLAMA3 };

struct ht_bpe_trainer;

enum ht_status ht_bpe_trainer_create(struct ht_bpe_trainer **out, enum ht_bpe_style style,
                                     int n_threads);
void ht_bpe_trainer_free(struct ht_bpe_trainer *t);

/* Count the words of n documents, in parallel. The counts do not depend on order or threads. */
enum ht_status ht_bpe_trainer_add(struct ht_bpe_trainer *t, const char *const *texts,
                                  const size_t *n_bytes, int64_t n);

/* Learn up to vocab_size tokens (fewer when no pair is left) and return a tokenizer.json that
 * Hugging Face loads (free() it). HT_ERR_ARG: vocab_size below 256 + n_specials or above 1000000;
 * a special token that is empty, not UTF-8, repeated, or a piece of the text's words. */
enum ht_status ht_bpe_trainer_learn(struct ht_bpe_trainer *t, int64_t vocab_size,
                                    const char *const *specials, int n_specials, char **json,
                                    int64_t *learned);

#endif
