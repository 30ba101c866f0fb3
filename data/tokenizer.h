/* data/tokenizer.h: text <-> token ids, as a Hugging Face tokenizer.json says [4].
 *
 * BPE models: byte-level (GPT-2, Llama-3/Bamba style) and with byte fallback; added and special
 * tokens; the normalizers, pre-tokenizers, post-processors and decoders of spec/ecosystem 4.3. An
 * unknown type is an error that names it. A tokenizer is read-only after loading and may be used by
 * many threads, each with its own encoder.
 */
#ifndef HT_DATA_TOKENIZER_H
#define HT_DATA_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/base/status.h"

struct ht_tokenizer;
struct ht_encoder;       // scratch memory and cache of one thread
struct ht_token_decoder; // ids -> UTF-8 text as it becomes complete

struct ht_ids { // growable; zero-initialise, free with ht_ids_free
    int32_t *ids;
    int64_t n, capacity;
};
enum ht_status ht_ids_append(struct ht_ids *a, const int32_t *ids, int64_t n);
void ht_ids_free(struct ht_ids *a);

enum ht_status ht_tokenizer_load(struct ht_tokenizer **out, const char *path);
enum ht_status ht_tokenizer_parse(struct ht_tokenizer **out, const char *json, size_t n_bytes,
                                  const char *name);
void ht_tokenizer_free(struct ht_tokenizer *t);

int64_t
ht_tokenizer_vocab_size(const struct ht_tokenizer *t); // largest id + 1, added tokens included
const char *ht_tokenizer_hash(const struct ht_tokenizer *t); // XXH3-128 of the file, 32 hex digits

/* Id of a token by its text ("<|endoftext|>"), -1 when there is none. */
int32_t ht_tokenizer_find(const struct ht_tokenizer *t, const char *token);

/* Text of a token as it stands in the vocabulary; NULL when the id is unused. */
const char *ht_tokenizer_token(const struct ht_tokenizer *t, int32_t id);
bool ht_tokenizer_is_special(const struct ht_tokenizer *t, int32_t id);

enum ht_status ht_encoder_create(struct ht_encoder **out, const struct ht_tokenizer *t);
void ht_encoder_free(struct ht_encoder *e);

/* Append the ids of text (any bytes; invalid UTF-8 becomes U+FFFD as Python's errors="replace"
 * does). add_special: what the post-processor adds (bos, eos). Linear in n_bytes up to a logarithm.
 */
enum ht_status ht_encode(struct ht_encoder *e, const char *text, size_t n_bytes, bool add_special,
                         struct ht_ids *out);

enum ht_status ht_token_decoder_create(struct ht_token_decoder **out, const struct ht_tokenizer *t,
                                       bool skip_special);
void ht_token_decoder_free(struct ht_token_decoder *d);

/* As ht_encode without add_special, but special tokens are looked for only where guard (n_bytes) is
 * 0: text from outside (1) is encoded as the characters it consists of. Other added tokens are
 * found everywhere. HT_ERR_ARG when text is not UTF-8. */
enum ht_status ht_encode_guarded(struct ht_encoder *e, const char *text, size_t n_bytes,
                                 const unsigned char *guard, struct ht_ids *out);

/* The text that becomes complete with this id: NUL-terminated UTF-8, borrowed until the next call;
 * may be empty (a character is not whole yet). finish gives what is left, incomplete characters as
 * U+FFFD. */
enum ht_status ht_token_decoder_push(struct ht_token_decoder *d, int32_t id, const char **text,
                                     size_t *n_bytes);
enum ht_status ht_token_decoder_finish(struct ht_token_decoder *d, const char **text,
                                       size_t *n_bytes);

#endif
