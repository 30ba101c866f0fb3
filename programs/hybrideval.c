/* programs/hybrideval.c: loss, perplexity and bits per byte of a model on text, shards or token
 * lists. */
#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/file.h"
#include "core/base/thread.h"
#include "data/shard.h"
#include "data/text_source.h"
#include "inference/session.h"

static const char help[] =
    "Usage: hybrideval --model PATH --data SHARD.h5|TEXT... [options]\n"
    "       hybrideval --model PATH --tokens FILE.jsonl --logprobs [options]\n"
    "\n"
    "Every document is scored whole, token by token, each with all tokens before it as context "
    "(documents\n"
    "longer than the context go in pieces). PATH is a run folder, a checkpoint, or a Hugging Face "
    "folder.\n"
    "\n"
    "  --data PATH         a token shard (.h5) or text: a file, a folder, JSONL; more may follow\n"
    "  --tokens FILE       one JSON object {\"ids\": [...]} per line\n"
    "  --logprobs          for each line of --tokens print {\"logprobs\": [...]}: natural "
    "logarithms, one per\n"
    "                      token from the second on\n"
    "  --field NAME        field of JSONL documents (default text)\n"
    "  --tokenizer FILE    tokenizer.json to use instead of the model's\n"
    "  --ctx-size N        longest context (default 4096)\n"
    "  --max-tokens N      stop after about N tokens\n"
    "  --weights FORMAT    stored (default), fp32, bf16, int8, int4, int4z or fp8: what quantising "
    "costs\n"
    "  --fp32              the same as --weights fp32\n"
    "  --threads N, --json, --version, --help\n"
    "\n"
    "Bits per byte counts every byte: a token without a prediction (the first of a document) is "
    "charged\n"
    "log2(vocabulary). Exit codes: 0 done, 1 failure, 2 usage, 3 bad model or data, 5 out of "
    "memory.\n";

struct totals {
    double nats;
    int64_t n_scored, n_tokens, n_docs, n_bytes;
    bool cut;
};

struct evaluation {
    struct ht_session session;
    float *logprobs; // (context)
    int64_t max_tokens;
    struct totals sum;
};

static int fail(enum ht_status st)
{
    fprintf(stderr, "hybrideval: %s\n", ht_error_message());
    return ht_exit_code(st);
}

static bool enough(struct evaluation *e)
{
    e->sum.cut = e->max_tokens > 0 && e->sum.n_tokens >= e->max_tokens;
    return e->sum.cut;
}

/* One document in pieces of at most the context. */
static enum ht_status score_document(struct evaluation *e, const int32_t *ids, int64_t n)
{
    for (int64_t at = 0; at < n; at += e->session.context) {
        const int64_t left = n - at, piece = left < e->session.context ? left : e->session.context;
        ht_state_reset(e->session.state);
        HT_TRY(
            ht_decoder_score(e->session.decoder, e->session.state, ids + at, piece, e->logprobs));
        for (int64_t i = 1; i < piece; i++) e->sum.nats -= (double)e->logprobs[i];
        e->sum.n_scored += piece > 0 ? piece - 1 : 0;
    }
    e->sum.n_tokens += n;
    e->sum.n_docs++;
    return HT_OK;
}

static enum ht_status score_shard(struct evaluation *e, const char *path)
{
    struct ht_shard *s = NULL;
    enum ht_status st = HT_OK;
    int32_t *ids = NULL;

    HT_TRY_GOTO(st, done, ht_shard_open(&s, path));
    if (ht_shard_vocab_size(s) > e->session.l.model->cfg.vocab_size) {
        st = HT_FAIL(HT_ERR_FORMAT, "%s: vocabulary of %lld tokens; the model has %lld", path,
                     (long long)ht_shard_vocab_size(s),
                     (long long)e->session.l.model->cfg.vocab_size);
        goto done;
    }
    for (int64_t doc = 0; doc < ht_shard_n_docs(s) && !enough(e); doc++) {
        const int64_t n = ht_shard_doc_length(s, doc);
        int32_t *bigger = realloc(ids, (size_t)(n + 1) * sizeof *ids);
        if (!bigger) {
            st = HT_FAIL(HT_ERR_MEMORY, "no memory for a document of %lld tokens", (long long)n);
            goto done;
        }
        ids = bigger;
        HT_TRY_GOTO(st, done, ht_shard_read(s, doc, 0, n, ids));
        HT_TRY_GOTO(st, done, score_document(e, ids, n));
    }
    e->sum.n_bytes += ht_shard_text_bytes(s);
done:
    free(ids);
    ht_shard_close(s);
    return st;
}

static enum ht_status score_text(struct evaluation *e, char *path, const char *field)
{
    const struct ht_text_options options = { .field = field };
    struct ht_text_source *source = NULL;
    struct ht_encoder *encoder = NULL;
    struct ht_ids ids = { 0 };
    enum ht_status st = HT_OK;
    const char *text;
    size_t n;

    if (!e->session.l.tokenizer)
        return HT_FAIL(HT_ERR_ARG, "%s has no tokenizer.json; give --tokenizer or a shard",
                       ht_weights_resolved_path(e->session.l.weights));
    HT_TRY_GOTO(st, done, ht_text_open(&source, &path, 1, &options));
    HT_TRY_GOTO(st, done, ht_encoder_create(&encoder, e->session.l.tokenizer));
    while (!enough(e)) {
        HT_TRY_GOTO(st, done, ht_text_next(source, &text, &n));
        if (!text) break;
        ids.n = 0;
        HT_TRY_GOTO(st, done, ht_encode(encoder, text, n, false, &ids));
        HT_TRY_GOTO(st, done, score_document(e, ids.ids, ids.n));
        e->sum.n_bytes += (int64_t)n;
    }
done:
    ht_ids_free(&ids);
    ht_encoder_free(encoder);
    ht_text_close(source);
    return st;
}

static enum ht_status parse_line(const char *line, size_t n_line, const char *path, int64_t number,
                                 int64_t vocab_size, struct ht_ids *ids)
{
    json_error_t error;
    json_t *root = json_loadb(line, n_line, JSON_REJECT_DUPLICATES, &error), *value;
    const json_t *list = json_object_get(root, "ids");
    enum ht_status st = HT_OK;
    size_t i;

    ids->n = 0;
    if (!root)
        st = HT_FAIL(HT_ERR_FORMAT, "%s:%lld: column %d: %s", path, (long long)number, error.column,
                     error.text);
    else if (!json_is_array(list))
        st = HT_FAIL(HT_ERR_FORMAT, "%s:%lld: no list \"ids\"", path, (long long)number);
    json_array_foreach(list, i, value)
    {
        const int64_t id = json_is_integer(value) ? json_integer_value(value) : -1;
        const int32_t id32 = (int32_t)id;
        if (st == HT_OK && (id < 0 || id >= vocab_size))
            st = HT_FAIL(HT_ERR_FORMAT, "%s:%lld: ids[%zu] is not an integer from 0 to %lld", path,
                         (long long)number, i, (long long)vocab_size - 1);
        if (st == HT_OK) st = ht_ids_append(ids, &id32, 1);
    }
    json_decref(root);
    return st;
}

static enum ht_status score_token_file(struct evaluation *e, const char *path, bool print)
{
    FILE *f = fopen(path, "re");
    enum ht_status st = HT_OK;
    struct ht_ids ids = { 0 };
    int64_t number = 0;
    char *line = NULL;
    size_t room = 0;
    ssize_t n;

    if (!f) return HT_FAIL(HT_ERR_IO, "%s: %s", path, strerror(errno));
    while (!enough(e) && (n = getline(&line, &room, f)) >= 0) {
        number++;
        if (strspn(line, " \t\r\n") == (size_t)n) continue;
        HT_TRY_GOTO(
            st, done,
            parse_line(line, (size_t)n, path, number, e->session.l.model->cfg.vocab_size, &ids));
        if (print && ids.n > e->session.context) {
            st = HT_FAIL(HT_ERR_FORMAT, "%s:%lld: %lld ids; the context holds %lld (--ctx-size)",
                         path, (long long)number, (long long)ids.n, (long long)e->session.context);
            goto done;
        }
        HT_TRY_GOTO(st, done, score_document(e, ids.ids, ids.n));
        if (!print) continue;
        fputs("{\"logprobs\":[", stdout);
        for (int64_t i = 1; i < ids.n; i++)
            printf("%s%.9g", i > 1 ? "," : "", (double)e->logprobs[i]);
        puts("]}");
    }
    if (ferror(f)) st = HT_FAIL(HT_ERR_IO, "%s: %s", path, strerror(errno));
done:
    free(line);
    ht_ids_free(&ids);
    fclose(f);
    return st;
}

static void print_totals(const struct evaluation *e, const char *name, bool json)
{
    const struct totals *s = &e->sum;
    const double loss = s->n_scored ? s->nats / (double)s->n_scored : 0.0;
    const double first =
        (double)(s->n_tokens - s->n_scored) * log((double)e->session.l.model->cfg.vocab_size);
    const double bits =
        s->n_bytes > 0 && !s->cut ? (s->nats + first) / log(2.0) / (double)s->n_bytes : 0.0;

    if (json) {
        printf("{\"model\": \"%s\", \"documents\": %" PRId64 ", \"tokens\": %" PRId64
               ", \"scored\": %" PRId64 ", \"loss\": %.6f, \"perplexity\": %.4f",
               name, s->n_docs, s->n_tokens, s->n_scored, loss, exp(loss));
        if (bits > 0.0) printf(", \"bits_per_byte\": %.5f", bits);
        puts("}");
        return;
    }
    printf("%s: loss %.4f nats per token, perplexity %.2f", name, loss, exp(loss));
    if (bits > 0.0) printf(", %.3f bits per byte", bits);
    printf(" (%" PRId64 " documents, %" PRId64 " tokens)\n", s->n_docs, s->n_tokens);
}

static bool ends_in(const char *path, const char *end)
{
    const size_t n = strlen(path), m = strlen(end);
    return n > m && strcmp(path + n - m, end) == 0;
}

static enum ht_status evaluate(struct evaluation *e, const struct ht_session_options *options,
                               char **data, int n_data, const char *field, const char *tokens,
                               bool logprobs, bool json)
{
    const double start_s = ht_time_s();

    HT_TRY(ht_session_open(&e->session, options));
    e->logprobs = malloc((size_t)e->session.context * sizeof *e->logprobs);
    if (!e->logprobs)
        return HT_FAIL(HT_ERR_MEMORY, "no memory for %lld scores", (long long)e->session.context);
    if (tokens) HT_TRY(score_token_file(e, tokens, logprobs));
    for (int i = 0; i < n_data && !enough(e); i++)
        HT_TRY(ends_in(data[i], ".h5") ? score_shard(e, data[i]) : score_text(e, data[i], field));
    if (!logprobs) print_totals(e, options->path, json);
    if (fflush(stdout) != 0) return HT_FAIL(HT_ERR_IO, "standard output: %s", strerror(errno));
    fprintf(stderr, "%.1f s, %.0f tokens/s\n", ht_time_s() - start_s,
            (double)e->sum.n_tokens / (ht_time_s() - start_s));
    return HT_OK;
}

int main(int argc, char **argv)
{
    static const struct option names[] = {
        { "model", 1, NULL, 'm' },      { "data", 1, NULL, 'd' },
        { "tokens", 1, NULL, 't' },     { "logprobs", 0, NULL, 'l' },
        { "field", 1, NULL, 'f' },      { "tokenizer", 1, NULL, 'k' },
        { "ctx-size", 1, NULL, 'c' },   { "max-model-len", 1, NULL, 'c' },
        { "max-tokens", 1, NULL, 'n' }, { "threads", 1, NULL, 'j' },
        { "fp32", 0, NULL, 'p' },       { "weights", 1, NULL, 'w' },
        { "json", 0, NULL, 'J' },       { "version", 0, NULL, 'v' },
        { "help", 0, NULL, 'h' },       { NULL, 0, NULL, 0 },
    };
    const struct ht_log log = { .level = HT_LOG_WARN, .terminal = stderr };
    struct ht_session_options options = { .log = &log };
    struct evaluation e = { 0 };
    const char *tokens = NULL, *field = NULL;
    bool logprobs = false, json = false;
    char *end = "", **data = calloc((size_t)argc + 1, sizeof *data);
    int n_data = 0, opt;

    ht_thread_limit_spinning(argv);
    if (!data) return 5;
    while ((opt = getopt_long(argc, argv, "h", names, NULL)) != -1) {
        switch (opt) {
        case 'm': options.path = optarg; break;
        case 'd': data[n_data++] = optarg; break;
        case 't': tokens = optarg; break;
        case 'l': logprobs = true; break;
        case 'f': field = optarg; break;
        case 'k': options.tokenizer = optarg; break;
        case 'c': options.context = strtoll(optarg, &end, 10); break;
        case 'n': e.max_tokens = strtoll(optarg, &end, 10); break;
        case 'j': options.threads = (int)strtol(optarg, &end, 10); break;
        case 'p': options.weights = "fp32"; break;
        case 'w': options.weights = optarg; break;
        case 'J': json = true; break;
        case 'v': printf("hybrideval %s\n", HT_VERSION); return 0;
        case 'h': fputs(help, stdout); return 0;
        default: return 2;
        }
        if (*end || options.context < 0 || options.context > 1 << 24 || e.max_tokens < 0 ||
            options.threads < 0 || options.threads > 1024) {
            fprintf(stderr, "hybrideval: '%s' is not a usable number here; try --help\n", optarg);
            return 2;
        }
    }
    while (optind < argc) data[n_data++] = argv[optind++];
    if (!options.path || (!tokens && n_data == 0) || (logprobs && !tokens)) {
        fputs(
            "hybrideval: --model and --data (or --tokens with --logprobs) are needed; try --help\n",
            stderr);
        return 2;
    }
    const enum ht_status st = evaluate(&e, &options, data, n_data, field, tokens, logprobs, json);
    ht_session_close(&e.session);
    free(e.logprobs);
    free(data);
    return st == HT_OK ? 0 : fail(st);
}
