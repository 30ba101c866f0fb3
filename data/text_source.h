/* data/text_source.h: documents from files, folders and JSONL, each plain, gzip or zstd [4].
 *
 * Folders are walked recursively, the names in each in byte order; hidden files and symbolic links
 * to folders are left out. Compression is recognised by content. A name that ends in .jsonl or
 * .ndjson (before .gz or .zst) is JSONL: one object per line, its `field` is the document. Any
 * other file is text: one document, or one per line. Lines end in LF or CR LF; a byte order mark at
 * the start of a file is no text. Reading is streaming: memory holds one document, at most
 * max_document_bytes (HT_ERR_FORMAT beyond, with file and line).
 */
#ifndef HT_DATA_TEXT_SOURCE_H
#define HT_DATA_TEXT_SOURCE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/base/status.h"

struct ht_text_source;

struct ht_text_options {
    const char *field;         // of JSONL objects; NULL = "text"
    bool lines;                // text files: every line that is not empty is a document
    size_t max_document_bytes; // 0 = 1 GiB
};

enum ht_status ht_text_open(struct ht_text_source **out, char *const *paths, int n_paths,
                            const struct ht_text_options *o);
void ht_text_close(struct ht_text_source *s);

/* Next document, NUL-terminated, borrowed until the next call; *text = NULL after the last. */
enum ht_status ht_text_next(struct ht_text_source *s, const char **text, size_t *n_bytes);

/* Where the last document came from ("file:line" or "file"), and how far we are: compressed bytes
 * read and in all. */
const char *ht_text_place(struct ht_text_source *s);
void ht_text_progress(const struct ht_text_source *s, uint64_t *done, uint64_t *total);

#endif
