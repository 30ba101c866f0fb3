/* tests/fuzz/fuzz_manifest.c: a checkpoint's manifest, as it is and with a seal that fits, so that
 * what lies behind the hash is reached. What is accepted prints and parses again. */
#include "checkpoints/manifest.h"
#include "checkpoints/manifest_seal.h"
#include "tests/fuzz/fuzz.h"

static void parse(const char *text, size_t n)
{
    struct ht_manifest m = { 0 }, again = { 0 };
    char *printed = NULL;
    size_t n_printed = 0;
    const enum ht_status st = ht_manifest_parse(&m, text, n, "manifest.json");

    if (st == HT_OK) {
        FUZZ_HOLDS(ht_manifest_print(&printed, &n_printed, &m) == HT_OK);
        FUZZ_HOLDS(ht_manifest_parse(&again, printed, n_printed, "printed") == HT_OK);
        FUZZ_HOLDS(again.n_files == m.n_files && again.n_pieces == m.n_pieces &&
                   again.n_tensors == m.n_tensors && again.step == m.step);
        if (ht_manifest_index(&m, "manifest.json") == HT_OK)
            for (int64_t i = 0; i < m.n_pieces; i++)
                FUZZ_HOLDS(m.pieces[i].tensor >= 0 && m.pieces[i].tensor < m.n_tensors &&
                           m.pieces[i].file >= 0 && m.pieces[i].file < m.n_files);
        if (ht_manifest_merge(&again, &m, "manifest.json") == HT_OK)
            (void)ht_manifest_index(&again, "merged");
    } else {
        FUZZ_REFUSED(st);
    }
    free(printed);
    ht_manifest_free(&again);
    ht_manifest_free(&m);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    static const char seal[] = ",\n\"xxh3_128\"";
    char *text = fuzz_text(data, n);

    parse(text, n);
    const char *at = memmem(text, n, seal, sizeof seal - 1);
    const size_t body = at ? (size_t)(at - text) : n;
    char *sealed = malloc(body + HT_MANIFEST_SEAL_BYTES + 1), hex[HT_HASH_HEX];
    if (!sealed) abort();
    memcpy(sealed, text, body);
    const struct ht_hash h = ht_hash_of(text, body);
    ht_hash_print(hex, &h);
    snprintf(sealed + body, HT_MANIFEST_SEAL_BYTES + 1, HT_MANIFEST_SEAL, hex);
    parse(sealed, body + HT_MANIFEST_SEAL_BYTES);
    free(sealed);
    free(text);
    return 0;
}
