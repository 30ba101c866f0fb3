/* data/text_stream.h: the bytes of a file, decompressed when it is gzip or zstd (recognised by
 * content). */
#ifndef HT_DATA_TEXT_STREAM_H
#define HT_DATA_TEXT_STREAM_H

#include <stddef.h>
#include <stdint.h>

#include "core/base/status.h"

struct ht_text_stream;

enum ht_status ht_text_stream_open(struct ht_text_stream **out, const char *path);
void ht_text_stream_close(struct ht_text_stream *s);

/* Some of the next bytes, borrowed until skip; *n = 0 at the end. A truncated or damaged compressed
 * file is HT_ERR_FORMAT naming the file and the byte, and so is one that grows more than 2000
 * times. */
enum ht_status ht_text_stream_peek(struct ht_text_stream *s, const char **data, size_t *n);
void ht_text_stream_skip(struct ht_text_stream *s, size_t n);

uint64_t ht_text_stream_read_bytes(const struct ht_text_stream *s); // of the file, compressed

#endif
