/* tests/fuzz/fuzz_text.c: text and JSONL files, plain, gzip or zstd. Input: a byte of options, the
 * file. */
#include "data/text_source.h"
#include "tests/fuzz/fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    static char path[2][PATH_MAX + 16];
    const unsigned options = n > 0 ? data[0] : 0;
    const int jsonl = options >> 1 & 1;
    struct ht_text_source *s = NULL;
    const char *text = NULL;
    size_t n_bytes, total = 0;

    if (!path[0][0]) {
        snprintf(path[0], sizeof path[0], "%s/in.txt", fuzz_folder());
        snprintf(path[1], sizeof path[1], "%s/in.jsonl.gz", fuzz_folder());
    }
    FILE *f = fopen(path[jsonl], "wb");
    if (!f || (n > 1 && fwrite(data + 1, 1, n - 1, f) != n - 1) || fclose(f) != 0) abort();
    const struct ht_text_options o = { .field = options & 4 ? "content" : NULL,
                                       .lines = options & 1,
                                       .max_document_bytes = options & 8 ? 100 : 1 << 20 };
    char *paths[1] = { path[jsonl] };
    enum ht_status st = ht_text_open(&s, paths, 1, &o);
    while (st == HT_OK) {
        uint64_t done, all;
        st = ht_text_next(s, &text, &n_bytes);
        if (st != HT_OK || !text) break;
        FUZZ_HOLDS(text[n_bytes] == '\0' && n_bytes <= o.max_document_bytes);
        FUZZ_HOLDS(ht_text_place(s)[0] != '\0');
        ht_text_progress(s, &done, &all);
        FUZZ_HOLDS(done <= all);
        total += n_bytes;
    }
    if (st != HT_OK) FUZZ_REFUSED(st);
    FUZZ_HOLDS(total <= ((size_t)256 << 20) + 2001 * (n + (1 << 18))); // growth is bounded
    ht_text_close(s);
    return 0;
}
