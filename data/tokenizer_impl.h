/* data/tokenizer_impl.h: what a loaded tokenizer is made of; for tokenizer_*.c only.
 *
 *   text -> cut at added tokens -> normalizers -> stages (pre-tokenizers) -> BPE of each word ->
 * post-processor
 *
 * Where the last stage is ByteLevel, words stay raw bytes and the vocabulary is looked up by raw
 * bytes too: the map from bytes to characters is one to one, so the ids are those of the detour
 * over characters.
 */
#ifndef HT_DATA_TOKENIZER_IMPL_H
#define HT_DATA_TOKENIZER_IMPL_H

#include "data/pretokenize.h"
#include "data/tokenizer.h"

#define HT_TOKENIZER_MAX_VOCAB 1000000
#define HT_TOKENIZER_MAX_TOKEN_BYTES ((size_t)64 << 10)
#define HT_TOKENIZER_MAX_JSON_BYTES ((size_t)256 << 20)
#define HT_TOKENIZER_MAX_STAGES 16

struct ht_text { // borrowed bytes, not NUL-terminated
    const char *p;
    size_t n;
};

struct ht_token_table {          // text -> id, open addressing
    const struct ht_text *texts; // by id
    int32_t *slots;              // id, -1 free
    size_t mask;
};
enum ht_status ht_token_table_init(struct ht_token_table *t, const struct ht_text *texts,
                                   size_t n_max);
/* The id already there, or -1 and text is now found as id. */
int32_t ht_token_table_add(struct ht_token_table *t, int32_t id);
int32_t ht_token_table_find(const struct ht_token_table *t, const char *p, size_t n);

struct ht_merge { // one slot of the pair table
    uint64_t key; // left id << 32 | right id; HT_MERGE_FREE
    int32_t rank, id;
};
#define HT_MERGE_FREE UINT64_MAX

struct ht_added {
    struct ht_text match; // what is looked for (normalized, if so flagged)
    int32_t id;
    bool lstrip, rstrip, single_word, normalized, special;
};

struct ht_trie {    // added tokens; edges in one hash table
    uint64_t *keys; // node << 8 | byte, UINT64_MAX free
    int32_t *next;  // node at the other end
    size_t mask;
    int32_t *added; // by node: index of the added token that ends here, or -1
    int32_t n_nodes;
    bool first[256]; // bytes some token starts with
};

enum ht_norm_kind {
    HT_NORM_NFC,
    HT_NORM_NFD,
    HT_NORM_NFKC,
    HT_NORM_NFKD,
    HT_NORM_PREPEND,
    HT_NORM_REPLACE,
    HT_NORM_STRIP,
};
struct ht_norm {
    enum ht_norm_kind kind;
    struct ht_splitter *pattern; // REPLACE
    char *content;               // PREPEND, REPLACE
    bool left, right;            // STRIP
};

enum ht_stage_kind { HT_STAGE_SPLIT, HT_STAGE_BYTE_LEVEL, HT_STAGE_METASPACE };
enum ht_behavior {
    HT_SPLIT_ISOLATED,
    HT_SPLIT_REMOVED,
    HT_SPLIT_PREVIOUS,
    HT_SPLIT_NEXT,
    HT_SPLIT_CONTIGUOUS,
};
enum ht_prepend { HT_PREPEND_NEVER, HT_PREPEND_FIRST, HT_PREPEND_ALWAYS };
struct ht_stage {
    enum ht_stage_kind kind;
    struct ht_splitter *pattern; // SPLIT; BYTE_LEVEL with use_regex, else NULL
    enum ht_behavior behavior;
    bool invert;
    bool add_prefix_space; // BYTE_LEVEL
    bool raw;              // BYTE_LEVEL, last stage: leave the bytes as they are
    char replacement[8];   // METASPACE
    enum ht_prepend prepend;
    bool split;
};

enum ht_decode_kind {
    HT_DECODE_BYTE_LEVEL,
    HT_DECODE_REPLACE,
    HT_DECODE_BYTE_FALLBACK,
    HT_DECODE_FUSE,
    HT_DECODE_STRIP,
    HT_DECODE_METASPACE,
    HT_DECODE_SPACES, // no decoder: tokens joined by spaces
};
struct ht_decode {
    enum ht_decode_kind kind;
    bool fused; // sees one text, not tokens
    char *pattern, *content;
    int64_t start, stop; // STRIP
    enum ht_prepend prepend;
};

struct ht_tokenizer {
    struct ht_text *texts;  // by id; p NULL where unused
    struct ht_text *raw;    // by id: bytes behind the characters, where there are such
    unsigned char *special; // by id
    char *pool, *raw_pool;  // what texts and raw point into, each NUL-terminated
    int64_t n_ids;
    char hash[33];

    struct ht_token_table by_text; // model vocabulary and added tokens
    struct ht_token_table model;   // model vocabulary: what BPE may find, by text or raw bytes
    struct ht_merge *merges;
    size_t merge_mask;
    bool byte_level;       // last stage is ByteLevel
    int32_t byte_ids[256]; // symbol of a byte: its character (byte_level); -1 none
    int32_t fallback_ids[256];
    int32_t unk_id;
    bool byte_fallback, fuse_unk, ignore_merges;

    struct ht_added *added;
    int64_t n_added;
    char *added_pool;
    struct ht_trie tries[2]; // matched before and after normalizing

    struct ht_norm norms[HT_TOKENIZER_MAX_STAGES];
    int n_norms;
    struct ht_stage stages[HT_TOKENIZER_MAX_STAGES];
    int n_stages;
    struct ht_decode decodes[HT_TOKENIZER_MAX_STAGES];
    int n_decodes;
    struct ht_ids prefix, suffix; // what the post-processor adds
};

/* The parts of tokenizer.json around the vocabulary (tokenizer_parts.c). */
struct json_t;
enum ht_status ht_tokenizer_load_parts(struct ht_tokenizer *t, struct json_t *root,
                                       const char *name);

struct ht_bytes { // growable text
    char *p;
    size_t n, capacity;
};
enum ht_status ht_bytes_append(struct ht_bytes *b, const char *p, size_t n);

/* Append text (valid UTF-8) in NFC, NFD, NFKC or NFKD (normal_form.c). */
enum ht_status ht_normal_form(struct ht_bytes *out, enum ht_norm_kind kind, const char *text,
                              size_t n);

/* out = what the normalizers make of text; patterns[i] is the match data of norms[i]. */
enum ht_status ht_tokenizer_normalize(const struct ht_tokenizer *t,
                                      struct ht_splitter_work *const *patterns,
                                      struct ht_bytes *out, struct ht_bytes *scratch,
                                      const char *text, size_t n);

/* Bytes of Unicode white space at either end of text. */
size_t ht_text_spaces_at_start(const char *p, size_t n);
size_t ht_text_spaces_at_end(const char *p, size_t n);

/* BPE of one word (tokenizer_bpe.c): *n symbols in ids, merged in place; *n becomes how many are
 * left. */
struct ht_bpe_work {
    int32_t *prev, *next;
    struct ht_bpe_candidate {
        int32_t rank, at, id;
    } * heap;
    int64_t capacity;
};
enum ht_status ht_bpe_merge(const struct ht_tokenizer *t, struct ht_bpe_work *w, int32_t *ids,
                            int64_t *n);
void ht_bpe_work_free(struct ht_bpe_work *w);

const struct ht_merge *ht_tokenizer_merge(const struct ht_tokenizer *t, int32_t left,
                                          int32_t right);

static inline uint64_t ht_hash_pair(uint64_t key)
{
    key ^= key >> 32;
    key *= 0x9E3779B97F4A7C15u;
    return key ^ key >> 29;
}

#endif
