/* tests/fuzz/seeds.c: good inputs that no fixture holds as a file: fuzz_seeds FOLDER makes
 * FOLDER/TARGET/NAME.
 */
#include <jansson.h>
#include <zlib.h>
#include <zstd.h>

#include "checkpoints/manifest.h"
#include "data/loader.h"
#include "data/shard_format.h"
#include "tests/fuzz/small_shard.h"

static const char *folder;

static void write_seed(const char *target, const char *name, const char *prefix, const void *data,
                       size_t n)
{
    char path[PATH_MAX];

    snprintf(path, sizeof path, "%s/%s", folder, target);
    FUZZ_HOLDS(ht_file_make_dirs(path) == HT_OK);
    snprintf(path, sizeof path, "%s/%s/%s", folder, target, name);
    FILE *f = fopen(path, "wb");
    FUZZ_HOLDS(f && fwrite(prefix, 1, strlen(prefix), f) == strlen(prefix) &&
               fwrite(data, 1, n, f) == n && fclose(f) == 0);
}

static void loader_states(void)
{
    char path[PATH_MAX + 16], name[32], *text;
    struct ht_loader *l;
    struct ht_loader_state s;
    const struct ht_batch *b;

    snprintf(path, sizeof path, "%s/small.h5", fuzz_folder());
    small_shard(path);
    const struct ht_loader_dataset sets[2] = { { path, 2.0 }, { path, 1.0 } };
    FUZZ_HOLDS(ht_loader_open(&l, &(struct ht_loader_options){ .n_datasets = 2,
                                                               .datasets = sets,
                                                               .seq_len = 16,
                                                               .rows_per_step = 4,
                                                               .micro_rows = 4,
                                                               .n_ranks = 1,
                                                               .seed = 1,
                                                               .shuffle = true,
                                                               .window_rows = 32 }) == HT_OK);
    for (int step = 0; step < 60; step++) {
        if (step % 12 == 0) {
            ht_loader_get_state(l, &s);
            FUZZ_HOLDS(ht_loader_state_to_json(&text, &s) == HT_OK);
            snprintf(name, sizeof name, "step-%d", step);
            write_seed("loader_state", name, "", text, strlen(text));
            free(text);
        }
        FUZZ_HOLDS(ht_loader_next(l, &b, NULL) == HT_OK);
    }
    ht_loader_close(l);
}

static void shards(void)
{
    char path[PATH_MAX + 16], *file;
    size_t n;

    snprintf(path, sizeof path, "%s/small.h5", fuzz_folder());
    small_shard(path);
    FUZZ_HOLDS(ht_file_read(&file, &n, path, 1 << 20) == HT_OK);
    write_seed("shard", "file", "f", file, n);
    free(file);
    for (int place = 0; place < 75; place += 3) { // one value of each kind
        static const int64_t values[] = { 0, 1, -1, INT64_MAX, INT64_MIN, 59, 61, 1 << 16 };
        char name[32];
        unsigned char patch[9] = { (unsigned char)place };
        memcpy(patch + 1, &values[place / 3 % 8], 8);
        snprintf(name, sizeof name, "patch-%d", place);
        write_seed("shard", name, "p", patch, sizeof patch);
    }
}

static void compressed(const char *name, const char *options, const char *text, size_t n)
{
    char out[65536], full[64];
    z_stream z = { .next_in = (unsigned char *)(uintptr_t)text,
                   .avail_in = (unsigned)n,
                   .next_out = (unsigned char *)out,
                   .avail_out = sizeof out };

    write_seed("text", name, options, text, n);
    FUZZ_HOLDS(deflateInit2(&z, 9, Z_DEFLATED, 31, 8, 0) == Z_OK); // 31: a gzip header
    FUZZ_HOLDS(deflate(&z, Z_FINISH) == Z_STREAM_END);
    snprintf(full, sizeof full, "%s.gz", name);
    write_seed("text", full, options, out, z.total_out);
    deflateEnd(&z);
    const size_t m = ZSTD_compress(out, sizeof out, text, n, 3);
    FUZZ_HOLDS(!ZSTD_isError(m));
    snprintf(full, sizeof full, "%s.zst", name);
    write_seed("text", full, options, out, m);
}

static void texts(void)
{
    static const char plain[] = "\xef\xbb\xbf"
                                "A line.\r\n\nAnother, \xc3\xa9\xe4\xb8\xad.\nThe last";
    static const char lines[] = "{\"text\": \"one \\u00e9\\n two\", \"id\": 1}\n\n"
                                "{\"id\": [1, {\"text\": 2}], \"text\": \"\\ud83d\\ude00\"}\r\n"
                                "{\"content\": \"other\", \"text\": \"\"}";
    static char zeros[20000];

    compressed("plain", "0", plain, sizeof plain - 1); // bits: lines, jsonl, field, short
    compressed("lines", "1", plain, sizeof plain - 1);
    compressed("jsonl", "2", lines, sizeof lines - 1);
    compressed("short", ">", lines, sizeof lines - 1);
    compressed("zeros", "0", zeros, sizeof zeros);
}

static void safetensors(void)
{
    static const char header[] =
        "{\"__metadata__\":{\"format\":\"pt\"},"
        "\"b\":{\"dtype\":\"BF16\",\"shape\":[3],\"data_offsets\":[24,30]},"
        "\"a\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[0,24]},"
        "\"empty\":{\"dtype\":\"F16\",\"shape\":[0,7],\"data_offsets\":[24,24]},"
        "\"scalar\":{\"dtype\":\"F16\",\"shape\":[],\"data_offsets\":[30,32]}}    ";
    char file[8 + sizeof header - 1 + 32] = { 0 };
    const uint64_t n = sizeof header - 1;

    memcpy(file, &n, 8);
    memcpy(file + 8, header, n);
    write_seed("safetensors", "small", "", file, sizeof file);
}

static void manifests(void)
{
    struct ht_mf_file files[2] = { { .name = "rank-00000-of-00002.h5", .n_bytes = 4096 },
                                   { .name = "rank-00001-of-00002.h5", .n_bytes = 4096 } };
    struct ht_mf_tensor tensors[2] = {
        { .name = "model.embed_tokens.weight", .n_dims = 2, .shape = { 8, 4 }, .n = 32 },
        { .name = "model.norm.weight", .n_dims = 1, .shape = { 4 }, .n = 4 },
    };
    struct ht_mf_piece pieces[12];
    int64_t at[2] = { 512, 512 };
    int n = 0;

    for (int array = 0; array < HT_CKPT_ARRAYS; array++)
        for (int tensor = 0; tensor < 2; tensor++)
            for (int file = 0; file < 2; file++) {
                const int64_t half = tensors[tensor].n / 2;
                pieces[n++] = (struct ht_mf_piece){ .array = array,
                                                    .tensor = tensor,
                                                    .file = file,
                                                    .start = file * half,
                                                    .n = half,
                                                    .at = at[file] };
                at[file] += 4 * half;
            }
    struct ht_manifest m = { .world = 2,
                             .step = 100,
                             .tokens = 819200,
                             .n_files = 2,
                             .n_tensors = 2,
                             .n_pieces = n,
                             .files = files,
                             .tensors = tensors,
                             .pieces = pieces };
    for (int part = 0; part < 2; part++) {
        char *text;
        size_t n_text;
        m.is_part = part;
        if (part) m.n_files = 1;
        if (part) m.n_pieces = 0;
        FUZZ_HOLDS(ht_manifest_print(&text, &n_text, &m) == HT_OK);
        write_seed("manifest", part ? "part" : "checkpoint", "", text, n_text);
        free(text);
    }
}

/* The templates of tests/golden/chat, and requests. */
static void chat_templates(void)
{
    static const char *const bodies[] = {
        "\0{\"model\":\"m\",\"prompt\":\"ab\",\"max_tokens\":3,\"temperature\":0.5,\"top_p\":0.9,"
        "\"logprobs\":1,\"echo\":true}",
        "\0{\"prompt\":[[0,1],[2]],\"n\":2,\"best_of\":3,\"stop\":[\"x\"],\"logit_bias\":{\"1\":-"
        "100},\"seed\":7}",
        "\0{\"prompt\":\"a\",\"response_format\":{\"type\":\"json_schema\",\"json_schema\":{"
        "\"schema\":{\"type\":\"object\"}}}}",
        "\1{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":\"a\"}]}],"
        "\"stream\":true,"
        "\"stream_options\":{\"include_usage\":true},\"tools\":[{}],\"logprobs\":true,\"top_"
        "logprobs\":2}",
        "\2{\"prompt\":\"ab\",\"add_special_tokens\":false}",
        "\3{\"tokens\":[0,1,7]}",
        "\4{\"type\":\"object\",\"properties\":{\"a\":{\"enum\":[1,\"x\"]},\"b\":{\"$ref\":\"#/"
        "$defs/n\"}},\"required\":[\"a\"],"
        "\"$defs\":{\"n\":{\"anyOf\":[{\"type\":\"array\",\"items\":{\"$ref\":\"#/$defs/"
        "n\"},\"maxItems\":3},{\"type\":\"null\"}]}}}",
        "\4{\"type\":\"string\",\"minLength\":1,\"maxLength\":4}",
    };
    const char *name;
    json_t *cases = json_load_file(HT_SOURCE_DIR "/tests/golden/chat/cases.json", 0, NULL), *text;
    if (!cases) abort();
    json_object_foreach(json_object_get(cases, "templates"), name, text)
        write_seed("chat_template", name, "", json_string_value(text), json_string_length(text));
    json_decref(cases);
    for (size_t i = 0; i < sizeof bodies / sizeof *bodies; i++) {
        char number[16];
        snprintf(number, sizeof number, "%zu", i);
        write_seed("request", number, "", bodies[i], 1 + strlen(bodies[i] + 1));
    }
}

int main(int argc, char **argv)
{
    if (argc != 2) {
        fprintf(stderr, "usage: fuzz_seeds FOLDER\n");
        return 2;
    }
    folder = argv[1];
    loader_states();
    shards();
    texts();
    safetensors();
    manifests();
    chat_templates();
    return 0;
}
