/* programs/hybriddata.c: corpora -> tokenizer and token shards. Argument parsing and progress,
 * nothing else. */
#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/base/file.h"
#include "data/bpe_train.h"
#include "data/shard.h"
#include "data/text_source.h"
#include "data/tokenize_corpus.h"
#include "data/tokenizer.h"

static const char help[] =
    "Usage: hybriddata train-tokenizer --vocab N --out tokenizer.json [options] INPUT...\n"
    "       hybriddata tokenize --tokenizer tokenizer.json --out SHARD.h5 [options] INPUT...\n"
    "       hybriddata encode --tokenizer tokenizer.json [--special]     (text on stdin, ids on "
    "stdout)\n"
    "       hybriddata decode --tokenizer tokenizer.json                 (ids on stdin, text on "
    "stdout)\n"
    "       hybriddata info SHARD.h5...\n"
    "\n"
    "INPUT is a text file, a folder (all files below it), or JSONL (*.jsonl, *.ndjson); each may "
    "be gzip or\n"
    "zstd. A text file is one document, or one per line with --lines.\n"
    "\n"
    "  --vocab N           tokens to learn, 256 to 1000000, special ones included\n"
    "  --style NAME        gpt2 or llama3: the pattern that cuts text into words (default llama3)\n"
    "  --special TOKEN     a special token; may be repeated (train-tokenizer)\n"
    "  --special           encode: add what the tokenizer's post-processor adds\n"
    "  --tokenizer FILE    a Hugging Face tokenizer.json\n"
    "  --eos TOKEN         appended to every document (default: none)\n"
    "  --holdout-every N   every N-th document goes to --holdout-out instead (validation data)\n"
    "  --holdout-out FILE  shard of the documents held out\n"
    "  --field NAME        field of JSONL objects (default: text)\n"
    "  --lines             every line of a text file is a document\n"
    "  --threads N         threads (default: all cores)\n"
    "  --out FILE          what is written: published by rename when complete\n"
    "  --version, --help\n"
    "\n"
    "The result goes to standard output, progress and errors to standard error. SIGINT and SIGTERM "
    "stop at the\n"
    "next batch; nothing half-written stays.\n"
    "\n"
    "Example: a folder of text files, every 50th held out:\n"
    "  hybriddata train-tokenizer --vocab 32000 --special '<|endoftext|>' --out tokenizer.json "
    "texts/\n"
    "  hybriddata tokenize --tokenizer tokenizer.json --eos '<|endoftext|>' --out train.h5 \\\n"
    "      --holdout-every 50 --holdout-out held-out.h5 texts/\n"
    "\n"
    "Exit codes: 0 done, 1 failure at run time, 2 usage, 3 bad input data, 5 out of memory or "
    "disk,\n"
    "75 stopped by a signal.\n";

struct arguments {
    const char *tokenizer, *out, *eos, *field, *style, *vocab, *holdout;
    long long holdout_every;
    const char *specials[256];
    int n_specials, threads;
    bool lines, add_special;
    char **inputs;
    int n_inputs;
};

static int usage(const char *what)
{
    fprintf(stderr, "hybriddata: %s; try hybriddata --help\n", what);
    return 2;
}

static int fail(enum ht_status st)
{
    fprintf(stderr, "hybriddata: %s\n", ht_error_message());
    return ht_exit_code(st);
}

static volatile sig_atomic_t stop_signal;

static void on_signal(int number)
{
    stop_signal = number;
}

/* SIGINT and SIGTERM end the work at the next batch, so that no temporary file stays behind. */
static void catch_signals(void)
{
    struct sigaction a = { .sa_handler = on_signal, .sa_flags = (int)SA_RESETHAND };
    sigaction(SIGINT, &a, NULL);
    sigaction(SIGTERM, &a, NULL);
}

/* Progress on a terminal: a bar, rate and time left. */
static bool progress(void *user, uint64_t done, uint64_t total, int64_t n_docs, int64_t n_tokens)
{
    double *start_s = user;
    const double s = ht_time_s() - *start_s, share = total ? (double)done / (double)total : 1.0;
    char bar[31];

    if (!isatty(STDERR_FILENO)) return stop_signal == 0;
    for (int i = 0; i < 30; i++) bar[i] = (double)i < share * 30.0 ? '#' : '.';
    bar[30] = '\0';
    fprintf(stderr, "\r[%s] %3.0f%%  %" PRId64 " documents  %.2f M tokens  %.1f MB/s  %.0f s left ",
            bar, 100.0 * share, n_docs, (double)n_tokens * 1e-6,
            (double)done * 1e-6 / (s > 0.0 ? s : 1.0), share > 0.0 ? s / share - s : 0.0);
    fflush(stderr);
    return stop_signal == 0;
}

static void end_progress(void)
{
    if (isatty(STDERR_FILENO)) fputc('\n', stderr);
}

static int run_train(const struct arguments *a)
{
    struct ht_text_source *source = NULL;
    struct ht_bpe_trainer *trainer = NULL;
    double start_s = ht_time_s();
    enum ht_status st = HT_OK;
    int64_t learned = 0;
    char *json = NULL, *end;

    if (!a->vocab) return usage("train-tokenizer needs --vocab");
    if (!a->out) return usage("train-tokenizer needs --out");
    if (a->n_inputs == 0) return usage("no INPUT");
    errno = 0;
    const long long vocab = strtoll(a->vocab, &end, 10);
    if (*end || end == a->vocab || errno || vocab < 256 || vocab > 1000000) {
        fprintf(stderr, "hybriddata: --vocab is '%s'; it must be from 256 to 1000000\n", a->vocab);
        return 2;
    }
    const bool gpt2 = a->style && strcmp(a->style, "gpt2") == 0;
    if (a->style && !gpt2 && strcmp(a->style, "llama3") != 0)
        return usage("--style must be gpt2 or llama3");
    const struct ht_text_options options = { .field = a->field, .lines = a->lines };
    HT_TRY_GOTO(st, done, ht_text_open(&source, a->inputs, a->n_inputs, &options));
    HT_TRY_GOTO(st, done,
                ht_bpe_trainer_create(&trainer, gpt2 ? HT_BPE_GPT2 : HT_BPE_LLAMA3, a->threads));
    catch_signals();
    st = ht_corpus_count_words(source, trainer, progress, &start_s);
    end_progress();
    if (st != HT_OK) goto done;
    HT_TRY_GOTO(st, done,
                ht_bpe_trainer_learn(trainer, vocab, a->specials, a->n_specials, &json, &learned));
    HT_TRY_GOTO(st, done, ht_file_publish(a->out, json, strlen(json)));
    printf("%s: %" PRId64 " tokens, %.1f s\n", a->out, learned, ht_time_s() - start_s);
done:
    free(json);
    ht_bpe_trainer_free(trainer);
    ht_text_close(source);
    return st == HT_OK ? 0 : fail(st);
}

static int run_tokenize(const struct arguments *a)
{
    struct ht_text_source *source = NULL;
    struct ht_tokenizer *tokenizer = NULL;
    struct ht_corpus_counts counts[2];
    double start_s = ht_time_s();
    enum ht_status st = HT_OK;
    int32_t eos = -1;

    if (!a->tokenizer) return usage("tokenize needs --tokenizer");
    if (!a->out) return usage("tokenize needs --out");
    if (a->n_inputs == 0) return usage("no INPUT");
    if ((a->holdout_every > 0) != (a->holdout != NULL))
        return usage("--holdout-every and --holdout-out go together");
    HT_TRY_GOTO(st, done, ht_tokenizer_load(&tokenizer, a->tokenizer));
    if (a->eos && (eos = ht_tokenizer_find(tokenizer, a->eos)) < 0) {
        st = HT_FAIL(HT_ERR_ARG, "--eos: %s has no token '%s'", a->tokenizer, a->eos);
        goto done;
    }
    const struct ht_text_options options = { .field = a->field, .lines = a->lines };
    HT_TRY_GOTO(st, done, ht_text_open(&source, a->inputs, a->n_inputs, &options));
    const struct ht_corpus_job job = { .source = source,
                                       .tokenizer = tokenizer,
                                       .eos_id = eos,
                                       .n_threads = a->threads,
                                       .out_path = a->out,
                                       .holdout_every = a->holdout_every,
                                       .holdout_path = a->holdout,
                                       .progress = progress,
                                       .user = &start_s };
    catch_signals();
    st = ht_corpus_tokenize(&job, counts);
    end_progress();
    if (st != HT_OK) goto done;
    const double s = ht_time_s() - start_s;
    for (int i = 0; i < (a->holdout_every ? 2 : 1); i++)
        printf("%s: %" PRId64 " documents, %" PRId64 " tokens, %.1f MB of text\n",
               i ? a->holdout : a->out, counts[i].n_docs, counts[i].n_tokens,
               (double)counts[i].n_bytes * 1e-6);
    fprintf(stderr, "hybriddata: %.1f s, %.1f MB/s\n", s,
            (double)(counts[0].n_bytes + counts[1].n_bytes) * 1e-6 / s);
done:
    ht_text_close(source);
    ht_tokenizer_free(tokenizer);
    return st == HT_OK ? 0 : fail(st);
}

static int run_info(const struct arguments *a)
{
    if (a->n_inputs == 0) return usage("info needs a shard");
    for (int i = 0; i < a->n_inputs; i++) {
        struct ht_shard *s = NULL;
        enum ht_status st = ht_shard_open(&s, a->inputs[i]);
        if (st == HT_OK) st = ht_shard_verify(s);
        if (st != HT_OK) {
            ht_shard_close(s);
            return fail(st);
        }
        printf("%s: %" PRId64 " documents, %" PRId64 " tokens, %" PRId64
               " bytes of text, vocabulary "
               "%" PRId64 ", tokenizer %s, all checksums right\n",
               a->inputs[i], ht_shard_n_docs(s), ht_shard_n_tokens(s), ht_shard_text_bytes(s),
               ht_shard_vocab_size(s), ht_shard_tokenizer_hash(s));
        ht_shard_close(s);
    }
    return 0;
}

/* All of stdin, at most 1 GiB. */
static enum ht_status read_stdin(char **out, size_t *n)
{
    size_t room = 1 << 16;
    char *text = malloc(room);

    *n = 0;
    while (text) {
        const size_t got = fread(text + *n, 1, room - *n - 1, stdin);
        *n += got;
        if (got == 0) break;
        if (*n + 1 < room) continue;
        if (room > (size_t)1 << 30) {
            free(text);
            return HT_FAIL(HT_ERR_FORMAT, "standard input: more than 1 GiB");
        }
        char *bigger = realloc(text, room *= 2);
        if (!bigger) free(text);
        text = bigger;
    }
    if (!text) return HT_FAIL(HT_ERR_MEMORY, "no memory for %zu bytes of standard input", *n);
    text[*n] = '\0';
    *out = text;
    return HT_OK;
}

static int run_encode(const struct arguments *a)
{
    struct ht_tokenizer *tokenizer = NULL;
    struct ht_encoder *encoder = NULL;
    struct ht_ids ids = { 0 };
    enum ht_status st = HT_OK;
    char *text = NULL;
    size_t n;

    if (!a->tokenizer) return usage("encode needs --tokenizer");
    HT_TRY_GOTO(st, done, ht_tokenizer_load(&tokenizer, a->tokenizer));
    HT_TRY_GOTO(st, done, ht_encoder_create(&encoder, tokenizer));
    HT_TRY_GOTO(st, done, read_stdin(&text, &n));
    HT_TRY_GOTO(st, done, ht_encode(encoder, text, n, a->add_special, &ids));
    for (int64_t i = 0; i < ids.n; i++) printf("%s%d", i ? " " : "", ids.ids[i]);
    putchar('\n');
done:
    free(text);
    ht_ids_free(&ids);
    ht_encoder_free(encoder);
    ht_tokenizer_free(tokenizer);
    return st == HT_OK ? 0 : fail(st);
}

static int run_decode(const struct arguments *a)
{
    struct ht_tokenizer *tokenizer = NULL;
    struct ht_token_decoder *decoder = NULL;
    enum ht_status st = HT_OK;
    const char *text;
    size_t n;
    int32_t id;
    int got;

    if (!a->tokenizer) return usage("decode needs --tokenizer");
    HT_TRY_GOTO(st, done, ht_tokenizer_load(&tokenizer, a->tokenizer));
    HT_TRY_GOTO(st, done, ht_token_decoder_create(&decoder, tokenizer, false));
    while ((got = scanf("%d", &id)) == 1) {
        HT_TRY_GOTO(st, done, ht_token_decoder_push(decoder, id, &text, &n));
        fwrite(text, 1, n, stdout);
    }
    if (got == 0) {
        st = HT_FAIL(HT_ERR_FORMAT, "standard input: not a number");
        goto done;
    }
    HT_TRY_GOTO(st, done, ht_token_decoder_finish(decoder, &text, &n));
    fwrite(text, 1, n, stdout);
done:
    ht_token_decoder_free(decoder);
    ht_tokenizer_free(tokenizer);
    return st == HT_OK ? 0 : fail(st);
}

int main(int argc, char **argv)
{
    static const struct option options[] = {
        { "vocab", 1, NULL, 'n' },         { "out", 1, NULL, 'o' },
        { "style", 1, NULL, 's' },         { "special", 2, NULL, 'S' },
        { "eos", 1, NULL, 'e' },           { "tokenizer", 1, NULL, 't' },
        { "holdout-every", 1, NULL, 'E' }, { "holdout-out", 1, NULL, 'O' },
        { "field", 1, NULL, 'f' },         { "lines", 0, NULL, 'l' },
        { "threads", 1, NULL, 'j' },       { "version", 0, NULL, 'v' },
        { "help", 0, NULL, 'h' },          { NULL, 0, NULL, 0 },
    };
    struct arguments a = { 0 };
    char *end;
    int opt;

    while ((opt = getopt_long(argc, argv, "h", options, NULL)) != -1) {
        switch (opt) {
        case 'n': a.vocab = optarg; break;
        case 'o': a.out = optarg; break;
        case 's': a.style = optarg; break;
        case 'S': // "--special TOKEN", "--special=TOKEN", or alone for encode
            if (!optarg && optind < argc && argv[optind][0] != '-' && argc > 1 &&
                strcmp(argv[1], "encode") != 0)
                optarg = argv[optind++];
            if (!optarg)
                a.add_special = true;
            else if (a.n_specials == 256)
                return usage("more than 256 special tokens");
            else
                a.specials[a.n_specials++] = optarg;
            break;
        case 'e': a.eos = optarg; break;
        case 'E':
            errno = 0;
            a.holdout_every = strtoll(optarg, &end, 10);
            if (*end || errno || a.holdout_every < 2)
                return usage("--holdout-every must be a whole number of 2 or more");
            break;
        case 'O': a.holdout = optarg; break;
        case 't': a.tokenizer = optarg; break;
        case 'f': a.field = optarg; break;
        case 'l': a.lines = true; break;
        case 'j':
            a.threads = (int)strtol(optarg, &end, 10);
            if (*end || a.threads < 1 || a.threads > 1024)
                return usage("--threads must be from 1 to 1024");
            break;
        case 'v': printf("hybriddata %s\n", HT_VERSION); return 0;
        case 'h': fputs(help, stdout); return 0;
        default: return usage("unknown option");
        }
    }
    if (optind >= argc) return usage("a command is missing");
    const char *command = argv[optind];
    a.inputs = argv + optind + 1;
    a.n_inputs = argc - optind - 1;
    if (strcmp(command, "train-tokenizer") == 0) return run_train(&a);
    if (strcmp(command, "tokenize") == 0) return run_tokenize(&a);
    if (strcmp(command, "encode") == 0) return run_encode(&a);
    if (strcmp(command, "decode") == 0) return run_decode(&a);
    if (strcmp(command, "info") == 0) return run_info(&a);
    return usage("unknown command");
}
