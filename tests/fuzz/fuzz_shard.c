/* tests/fuzz/fuzz_shard.c: the header of a token shard.
 *
 * Input 'f' and a file: opened as it is, and with a trailer whose own hash fits. Input 'p' and
 * patches of nine bytes, a place and a value: values of a good shard (header, offsets, checksums,
 * trailer) are replaced and all hashes made to fit, so that every check behind the hashes is
 * reached. HDF5 itself is given what the hashes vouch for only, and its own structures stay whole
 * here.
 */
#include <xxhash.h>

#include "data/shard_format.h"
#include "tests/fuzz/small_shard.h"

enum { N_HEADER = 6, MAX_PLACES = N_HEADER + 1 + SMALL_DOCS + 1 + 1 + 3 };

static unsigned char *good; // the HDF5 part
static struct ht_shard_trailer trailer;
static int64_t places[MAX_PLACES]; // header values, text_bytes, offsets, checksum; in `good`
static int n_places;
static int64_t offsets_at, checksum_at, header_hash_at;

/* HDF5's object headers, each before its checksum, whose function the library exports. */
uint32_t H5_checksum_metadata(const void *data, size_t n, uint32_t initval);
enum { MAX_OBJECTS = 32 };
static struct {
    int64_t at, end;
} objects[MAX_OBJECTS];
static int n_objects;

static void find_objects(void)
{
    for (int64_t at = 0; at + 8 < trailer.hdf5_bytes; at++) {
        if (memcmp(good + at, "OHDR", 4) != 0 && memcmp(good + at, "OCHK", 4) != 0) continue;
        for (int64_t end = at + 4; end + 4 <= trailer.hdf5_bytes; end++) {
            const uint32_t sum = H5_checksum_metadata(good + at, (size_t)(end - at), 0);
            if (memcmp(good + end, &sum, 4) != 0) continue;
            if (n_objects == MAX_OBJECTS) abort();
            objects[n_objects].at = at;
            objects[n_objects++].end = end;
            break;
        }
    }
    FUZZ_HOLDS(n_objects >= 5); // the root and four arrays
}

static int64_t find_value(int64_t from, int64_t value)
{
    for (int64_t at = from; at + 8 <= trailer.hdf5_bytes; at++)
        if (memcmp(good + at, &value, 8) == 0) return at;
    abort();
}

static int64_t find_attribute(const char *name, int64_t value)
{
    const unsigned char *at = memmem(good, (size_t)trailer.hdf5_bytes, name, strlen(name) + 1);

    if (!at) abort();
    return find_value(at - good, value);
}

static void learn(void)
{
    char path[PATH_MAX + 16], *file;
    struct ht_shard *s;
    int64_t offsets[SMALL_DOCS + 1] = { 0 }, n_tokens = 0;
    size_t n;

    snprintf(path, sizeof path, "%s/good.h5", fuzz_folder());
    small_shard(path);
    FUZZ_HOLDS(ht_file_read(&file, &n, path, 1 << 20) == HT_OK);
    memcpy(&trailer, file + n - sizeof trailer, sizeof trailer);
    good = (unsigned char *)file;
    for (int doc = 0; doc < SMALL_DOCS; doc++) offsets[doc + 1] = n_tokens += small_length(doc);
    const uint64_t offsets_hash = XXH3_64bits(offsets, sizeof offsets);
    const uint64_t checksum = XXH3_64bits(good + trailer.tokens_at, (size_t)trailer.tokens_bytes);
    const uint64_t checksums_hash = XXH3_64bits(&checksum, 8);
    FUZZ_HOLDS(ht_shard_open(&s, path) == HT_OK);
    const int64_t fingerprint = (int64_t)ht_shard_fingerprint(s);
    ht_shard_close(s);
    places[n_places++] = find_attribute("format_version", HT_SHARD_VERSION);
    places[n_places++] = find_attribute("vocab_size", SMALL_VOCAB);
    places[n_places++] = find_attribute("n_docs", SMALL_DOCS);
    places[n_places++] = find_attribute("n_tokens", n_tokens);
    places[n_places++] = find_attribute("doc_offsets_xxh3", (int64_t)offsets_hash);
    places[n_places++] = find_attribute("checksums_xxh3", (int64_t)checksums_hash);
    places[n_places++] = find_value(0, 5 * n_tokens); // /text_bytes
    header_hash_at = find_attribute("header_xxh3", fingerprint);
    offsets_at =
        (unsigned char *)memmem(good, (size_t)trailer.hdf5_bytes, offsets, sizeof offsets) - good;
    checksum_at = find_value(0, (int64_t)checksum);
    find_objects();
    for (int i = 0; i <= SMALL_DOCS; i++) places[n_places++] = offsets_at + 8 * i;
    places[n_places++] = checksum_at;
}

static enum ht_status read_all(const char *path, size_t n_file)
{
    struct ht_shard *s = NULL;
    enum ht_status st = ht_shard_open(&s, path);
    int32_t ids[256];

    if (st == HT_OK) {
        FUZZ_HOLDS(ht_shard_n_docs(s) <= (int64_t)n_file &&
                   ht_shard_n_tokens(s) <= (int64_t)n_file);
        for (int64_t doc = 0; doc < ht_shard_n_docs(s) && st == HT_OK; doc++) {
            const int64_t length = ht_shard_doc_length(s, doc);
            FUZZ_HOLDS(length >= 0 && length <= ht_shard_n_tokens(s));
            st = ht_shard_read(s, doc, 0, length < 256 ? length : 256, ids);
        }
        if (st == HT_OK) st = ht_shard_verify(s);
    }
    if (st != HT_OK) FUZZ_REFUSED(st);
    ht_shard_close(s);
    return st;
}

static void fix_trailer_hash(struct ht_shard_trailer *t)
{
    t->trailer_hash = XXH3_64bits(t, offsetof(struct ht_shard_trailer, trailer_hash));
}

static void whole_file(const uint8_t *data, size_t n)
{
    struct ht_shard_trailer t;

    read_all(fuzz_file(data, n, NULL), n);
    if (n < sizeof t) return;
    uint8_t *copy = malloc(n);
    if (!copy) abort();
    memcpy(copy, data, n);
    memcpy(&t, copy + n - sizeof t, sizeof t);
    memcpy(t.magic, trailer.magic, sizeof t.magic);
    fix_trailer_hash(&t);
    memcpy(copy + n - sizeof t, &t, sizeof t);
    read_all(fuzz_file(copy, n, NULL), n);
    free(copy);
}

static enum ht_status patched(const uint8_t *data, size_t n)
{
    const size_t n_hdf5 = (size_t)trailer.hdf5_bytes, n_file = n_hdf5 + sizeof trailer;
    struct ht_shard_trailer t = trailer;
    unsigned char *file = malloc(n_file);
    bool keep_hashes[2] = { false, false }; // of offsets and checksums: patched by hand

    if (!file) abort();
    memcpy(file, good, n_hdf5);
    for (size_t i = 0; i + 9 <= n; i += 9) {
        const int place = data[i] % (n_places + 3);
        int64_t value;
        memcpy(&value, data + i + 1, 8);
        if (place < n_places) memcpy(file + places[place], &value, 8);
        if (place == 4 || place == 5) keep_hashes[place - 4] = true;
        if (place == n_places) t.tokens_at = value;
        if (place == n_places + 1) t.tokens_bytes = value;
        if (place == n_places + 2) t.hdf5_bytes = value;
    }
    const uint64_t hashes[2] = { XXH3_64bits(file + offsets_at, 8 * (SMALL_DOCS + 1)),
                                 XXH3_64bits(file + checksum_at, 8) };
    for (int i = 0; i < 2; i++)
        if (!keep_hashes[i]) memcpy(file + places[4 + i], &hashes[i], 8);
    struct ht_shard_header h = { .tokenizer_hash = "00ff" };
    int64_t *const values[] = { &h.format_version, &h.vocab_size, &h.n_docs, &h.n_tokens };
    for (int i = 0; i < 4; i++) memcpy(values[i], file + places[i], 8);
    memcpy(&h.offsets_hash, file + places[4], 8);
    memcpy(&h.checksums_hash, file + places[5], 8);
    memcpy(&h.text_bytes, file + places[6], 8);
    const uint64_t header_hash = ht_shard_header_hash(&h);
    memcpy(file + header_hash_at, &header_hash, 8);
    for (int i = 0; i < n_objects; i++) {
        const int64_t from = objects[i].at, to = objects[i].end;
        const uint32_t sum = H5_checksum_metadata(file + from, (size_t)(to - from), 0);
        memcpy(file + to, &sum, 4);
    }
    if (t.tokens_at >= 0 && t.tokens_bytes >= 0 && t.tokens_at <= (int64_t)n_hdf5 &&
        t.tokens_bytes <= (int64_t)n_hdf5 - t.tokens_at) {
        const size_t end = (size_t)(t.tokens_at + t.tokens_bytes);
        unsigned char *outside = malloc(n_hdf5 + 1);
        XXH128_canonical_t canonical;
        if (!outside) abort();
        memcpy(outside, file, (size_t)t.tokens_at);
        memcpy(outside + t.tokens_at, file + end, n_hdf5 - end);
        const size_t n_outside = (size_t)t.tokens_at + n_hdf5 - end;
        XXH128_canonicalFromHash(&canonical, XXH3_128bits(outside, n_outside));
        memcpy(t.outside_hash, canonical.digest, 16);
        free(outside);
    }
    fix_trailer_hash(&t);
    memcpy(file + n_hdf5, &t, sizeof t);
    const enum ht_status st = read_all(fuzz_file(file, n_file, NULL), n_file);
    free(file);
    return st;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    if (!good) {
        learn();
        FUZZ_HOLDS(patched(data, 0) == HT_OK); // nothing replaced, all hashes made anew
    }
    if (n > 0 && data[0] == 'f') whole_file(data + 1, n - 1);
    if (n > 0 && data[0] == 'p') patched(data + 1, n - 1);
    return 0;
}
