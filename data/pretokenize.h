/* data/pretokenize.h: the regular expressions that cut text into words before BPE, through PCRE2.
 *
 * Text is valid UTF-8. A pattern is matched again and again from the left (UTF + UCP, JIT); pieces between matches
 * are words of their own ("Isolated"). Match and heap limits are set: a pattern that exceeds them is an error.
 */
#ifndef HT_DATA_PRETOKENIZE_H
#define HT_DATA_PRETOKENIZE_H

#include <stddef.h>
#include <stdint.h>

#include "core/base/status.h"

#define HT_PATTERN_GPT2 "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"
#define HT_PATTERN_LLAMA3                                                                            \
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"      \
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"

struct ht_splitter;      // compiled pattern, shared by threads
struct ht_splitter_work; // match data of one thread

enum ht_status ht_splitter_create(struct ht_splitter **out, const char *pattern);
void ht_splitter_free(struct ht_splitter *s);
enum ht_status ht_splitter_work_create(struct ht_splitter_work **out, const struct ht_splitter *s);
void ht_splitter_work_free(struct ht_splitter_work *w);

/* Next piece of text[*at .. n): [*start, *end) and whether it matched the pattern; *at moves to *end.
 * *end == *start: no text is left. */
enum ht_status ht_splitter_next(struct ht_splitter_work *w, const char *text, size_t n, size_t *at,
                                size_t *start, size_t *end, int *matched);

/* Byte -> the character that stands for it in byte-level vocabularies (GPT-2's bytes_to_unicode), as UTF-8 of
 * 1 or 2 bytes: returns its length. And back: the byte, or -1. */
int ht_byte_char_utf8(char out[2], unsigned char byte);
int ht_byte_from_char(uint32_t code_point);

/* Copy of text with every malformed sequence replaced by U+FFFD (one per maximal subpart, Unicode 3.9), or NULL in *out
 * when text is valid already. Caller frees. */
enum ht_status ht_utf8_repair(char **out, size_t *n_out, const char *text, size_t n);

#endif
