/* programs/hybridgen.c: generate text in the terminal. Argument parsing and printing, nothing else.
 */
#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/base/file.h"
#include "core/base/thread.h"
#include "inference/sampler.h"
#include "inference/session.h"

static const char help[] =
    "Usage: hybridgen --model PATH [--prompt TEXT | --ids 1,2,3] [options]\n"
    "\n"
    "Generate text after a prompt (standard input when neither --prompt nor --ids is given). PATH "
    "is a run\n"
    "folder, a checkpoint, or a folder in Hugging Face form. Text goes to stdout as it is made.\n"
    "\n"
    "  --model PATH            what to run\n"
    "  --tokenizer FILE        tokenizer.json to use instead of the model's\n"
    "  --prompt TEXT           text to continue\n"
    "  --ids LIST              token ids to continue, separated by commas or blanks; needs no "
    "tokenizer\n"
    "  --print-ids             print token ids instead of text\n"
    "  --echo                  print the prompt, too\n"
    "  --n-predict N           tokens to make, 1 and more (alias --max-tokens; default 128)\n"
    "  --ctx-size N            tokens of prompt and answer together (alias --max-model-len; "
    "default 4096)\n"
    "  --temperature T         0 = greedy (default 0.8)\n"
    "  --top-k N               only the N likeliest; 0 = all (default 0)\n"
    "  --top-p P               smallest set with this probability (default 1)\n"
    "  --min-p P               at least P times the likeliest (default 0)\n"
    "  --repeat-penalty P      divides the odds of tokens already there; 1 = none (default 1)\n"
    "  --seed N                of the draws (default 0)\n"
    "  --ignore-eos            go on after the end-of-text token\n"
    "  --threads N             threads (default: all cores)\n"
    "  --weights FORMAT        stored (default), fp32, bf16, int8, int4, int4z or fp8: packed while "
    "loading\n"
    "  --fp32                  the same as --weights fp32\n"
    "  --stats                 print speeds to stderr\n"
    "  --version, --help\n"
    "\n"
    "Exit codes: 0 done, 1 failure at run time, 2 usage, 3 bad model or input, 5 out of memory.\n";

struct arguments {
    struct ht_session_options session;
    struct ht_sampler_options sampler;
    const char *prompt, *ids;
    int64_t n_predict;
    bool print_ids, echo, ignore_eos, stats;
};

static volatile sig_atomic_t interrupted;

static void on_interrupt(int number)
{
    (void)number;
    interrupted = 1;
}

static int fail(enum ht_status st)
{
    fprintf(stderr, "hybridgen: %s\n", ht_error_message());
    return ht_exit_code(st);
}

static enum ht_status parse_integer(int64_t *out, const char *name, const char *text, int64_t low,
                                    int64_t high)
{
    char *end;
    errno = 0;
    const long long v = strtoll(text, &end, 10);
    if (*end || end == text || errno || v < low || v > high)
        return HT_FAIL(HT_ERR_ARG, "--%s is '%s'; it must be from %lld to %lld", name, text,
                       (long long)low, (long long)high);
    *out = v;
    return HT_OK;
}

static enum ht_status parse_real(float *out, const char *name, const char *text)
{
    char *end;
    const double v = strtod(text, &end);
    if (*end || end == text)
        return HT_FAIL(HT_ERR_ARG, "--%s is '%s'; it must be a number", name, text);
    *out = (float)v; // bounds: inference/sampler.c
    return HT_OK;
}

static enum ht_status parse_ids(struct ht_ids *out, const char *text)
{
    while (*text) {
        char *end;
        errno = 0;
        const long v = strtol(text, &end, 10);
        if (end == text || errno || v < 0 || v > INT32_MAX)
            return HT_FAIL(HT_ERR_ARG, "--ids: '%.20s' is not a token id", text);
        const int32_t id = (int32_t)v;
        HT_TRY(ht_ids_append(out, &id, 1));
        text = end + strspn(end, ", \t\n");
    }
    return HT_OK;
}

static enum ht_status read_prompt(char **out, size_t *n)
{
    size_t room = 1 << 16;
    char *text = malloc(room);

    *n = 0;
    while (text) {
        const size_t got = fread(text + *n, 1, room - *n, stdin);
        *n += got;
        if (got == 0) break;
        if (*n < room) continue;
        if (room >= (size_t)256 << 20) {
            free(text);
            return HT_FAIL(HT_ERR_ARG, "the prompt on standard input is longer than 256 MiB");
        }
        char *bigger = realloc(text, room *= 2);
        if (!bigger) free(text);
        text = bigger;
    }
    if (!text) return HT_FAIL(HT_ERR_MEMORY, "no memory for the prompt");
    *out = text;
    return HT_OK;
}

/* Prompt ids: as given, or the prompt's text through the tokenizer. */
static enum ht_status make_prompt(struct ht_ids *ids, const struct ht_session *s,
                                  const struct arguments *a)
{
    struct ht_encoder *encoder = NULL;
    char *input = NULL;
    const char *text = a->prompt;
    size_t n = text ? strlen(text) : 0;
    enum ht_status st = HT_OK;

    if (a->ids) return parse_ids(ids, a->ids);
    if (!s->l.tokenizer)
        return HT_FAIL(HT_ERR_ARG, "%s has no tokenizer.json; give --tokenizer or --ids",
                       ht_weights_resolved_path(s->l.weights));
    if (!text) {
        HT_TRY(read_prompt(&input, &n));
        text = input;
    }
    HT_TRY_GOTO(st, done, ht_encoder_create(&encoder, s->l.tokenizer));
    HT_TRY_GOTO(st, done, ht_encode(encoder, text, n, true, ids));
done:
    ht_encoder_free(encoder);
    free(input);
    return st;
}

static enum ht_status emit(const struct arguments *a, struct ht_token_decoder *decoder, int32_t id)
{
    const char *text;
    size_t n;

    if (a->print_ids) {
        printf("%d ", id);
    } else if (decoder) {
        HT_TRY(ht_token_decoder_push(decoder, id, &text, &n));
        fwrite(text, 1, n, stdout);
    }
    if (fflush(stdout) != 0) return HT_FAIL(HT_ERR_IO, "standard output: %s", strerror(errno));
    return HT_OK;
}

static enum ht_status generate(struct ht_session *s, const struct arguments *a)
{
    const int64_t vocab_size = s->l.model->cfg.vocab_size;
    struct ht_token_decoder *decoder = NULL;
    struct ht_sampler *sampler = NULL;
    struct ht_ids prompt = { 0 };
    enum ht_status st = HT_OK;
    float *logits = malloc((size_t)vocab_size * sizeof *logits);
    double start_s, prefill_s = 0.0;
    const char *text;
    int64_t made = 0;
    size_t n;

    if (!logits) return HT_FAIL(HT_ERR_MEMORY, "no memory for %lld logits", (long long)vocab_size);
    if (s->l.tokenizer)
        HT_TRY_GOTO(st, done, ht_token_decoder_create(&decoder, s->l.tokenizer, true));
    if (!decoder && !a->print_ids) {
        st = HT_FAIL(HT_ERR_ARG, "%s has no tokenizer.json; give --tokenizer or --print-ids",
                     ht_weights_resolved_path(s->l.weights));
        goto done;
    }
    HT_TRY_GOTO(st, done, ht_sampler_create(&sampler, &a->sampler, vocab_size));
    HT_TRY_GOTO(st, done, make_prompt(&prompt, s, a));
    if (prompt.n == 0) {
        st = HT_FAIL(HT_ERR_ARG, "the prompt is empty: give at least one token");
        goto done;
    }
    for (int64_t i = 0; i < prompt.n; i++) {
        ht_sampler_accept(sampler, prompt.ids[i]);
        if (a->echo) HT_TRY_GOTO(st, done, emit(a, decoder, prompt.ids[i]));
    }
    start_s = ht_time_s();
    HT_TRY_GOTO(st, done, ht_decoder_extend(s->decoder, s->state, prompt.ids, prompt.n, logits));
    prefill_s = ht_time_s() - start_s;
    start_s = ht_time_s();
    while (!interrupted) {
        int32_t id;
        HT_TRY_GOTO(st, done, ht_sampler_pick(sampler, logits, prompt.n + made, &id));
        if (id == s->l.eos && !a->ignore_eos) break;
        ht_sampler_accept(sampler, id);
        HT_TRY_GOTO(st, done, emit(a, decoder, id));
        if (++made == a->n_predict || ht_state_n_tokens(s->state) == s->context) break;
        HT_TRY_GOTO(st, done, ht_decoder_extend(s->decoder, s->state, &id, 1, logits));
    }
    const double decode_s = ht_time_s() - start_s;
    if (decoder && !a->print_ids) {
        HT_TRY_GOTO(st, done, ht_token_decoder_finish(decoder, &text, &n));
        fwrite(text, 1, n, stdout);
    }
    putchar('\n');
    if (a->stats)
        fprintf(stderr,
                "prompt %" PRId64 " tokens, %.1f tokens/s; made %" PRId64 ", %.1f tokens/s; "
                "state %.1f MiB\n",
                prompt.n, (double)prompt.n / prefill_s, made, (double)made / decode_s,
                (double)ht_state_bytes(s->state) / 1048576.0);
done:
    free(logits);
    ht_ids_free(&prompt);
    ht_sampler_free(sampler);
    ht_token_decoder_free(decoder);
    return st;
}

enum option_code {
    O_MODEL = 256,
    O_TOKENIZER,
    O_PROMPT,
    O_IDS,
    O_PRINT_IDS,
    O_ECHO,
    O_N,
    O_CONTEXT,
    O_TEMPERATURE,
    O_TOP_K,
    O_TOP_P,
    O_MIN_P,
    O_REPEAT,
    O_SEED,
    O_IGNORE_EOS,
    O_THREADS,
    O_FP32,
    O_WEIGHTS,
    O_STATS,
    O_VERSION,
    O_HELP
};

static enum ht_status set_option(struct arguments *a, int code, const char *value)
{
    int64_t v = 0;

    switch (code) {
    case O_MODEL: a->session.path = value; break;
    case O_TOKENIZER: a->session.tokenizer = value; break;
    case O_PROMPT: a->prompt = value; break;
    case O_IDS: a->ids = value; break;
    case O_PRINT_IDS: a->print_ids = true; break;
    case O_ECHO: a->echo = true; break;
    case O_IGNORE_EOS: a->ignore_eos = true; break;
    case O_FP32: a->session.weights = "fp32"; break;
    case O_WEIGHTS: a->session.weights = value; break;
    case O_STATS: a->stats = true; break;
    case O_N: return parse_integer(&a->n_predict, "n-predict", value, 1, 1 << 30);
    case O_CONTEXT: return parse_integer(&a->session.context, "ctx-size", value, 1, 1 << 24);
    case O_TEMPERATURE: return parse_real(&a->sampler.temperature, "temperature", value);
    case O_TOP_P: return parse_real(&a->sampler.top_p, "top-p", value);
    case O_MIN_P: return parse_real(&a->sampler.min_p, "min-p", value);
    case O_REPEAT: return parse_real(&a->sampler.repetition_penalty, "repeat-penalty", value);
    case O_TOP_K: return parse_integer(&a->sampler.top_k, "top-k", value, 0, 1 << 24);
    case O_SEED:
        HT_TRY(parse_integer(&v, "seed", value, 0, INT64_MAX));
        a->sampler.seed = (uint64_t)v;
        break;
    case O_THREADS:
        HT_TRY(parse_integer(&v, "threads", value, 1, 1024));
        a->session.threads = (int)v;
        break;
    }
    return HT_OK;
}

int main(int argc, char **argv)
{
    static const struct option options[] = {
        { "model", 1, NULL, O_MODEL },
        { "tokenizer", 1, NULL, O_TOKENIZER },
        { "prompt", 1, NULL, O_PROMPT },
        { "ids", 1, NULL, O_IDS },
        { "print-ids", 0, NULL, O_PRINT_IDS },
        { "echo", 0, NULL, O_ECHO },
        { "n-predict", 1, NULL, O_N },
        { "max-tokens", 1, NULL, O_N },
        { "ctx-size", 1, NULL, O_CONTEXT },
        { "max-model-len", 1, NULL, O_CONTEXT },
        { "temperature", 1, NULL, O_TEMPERATURE },
        { "top-k", 1, NULL, O_TOP_K },
        { "top-p", 1, NULL, O_TOP_P },
        { "min-p", 1, NULL, O_MIN_P },
        { "repeat-penalty", 1, NULL, O_REPEAT },
        { "seed", 1, NULL, O_SEED },
        { "ignore-eos", 0, NULL, O_IGNORE_EOS },
        { "threads", 1, NULL, O_THREADS },
        { "fp32", 0, NULL, O_FP32 },
        { "weights", 1, NULL, O_WEIGHTS },
        { "stats", 0, NULL, O_STATS },
        { "version", 0, NULL, O_VERSION },
        { "help", 0, NULL, O_HELP },
        { NULL, 0, NULL, 0 },
    };
    const struct ht_log log = { .level = HT_LOG_WARN, .terminal = stderr };
    struct arguments a = {
        .n_predict = 128,
        .sampler = { .temperature = 0.8f, .top_p = 1.0f, .repetition_penalty = 1.0f },
        .session = { .log = &log }
    };
    struct ht_session session = { 0 };
    enum ht_status st = HT_OK;
    int opt;

    ht_thread_limit_spinning(argv);
    while ((opt = getopt_long(argc, argv, "h", options, NULL)) != -1) {
        if (opt == O_HELP || opt == 'h') return fputs(help, stdout) < 0;
        if (opt == O_VERSION) return printf("hybridgen %s\n", HT_VERSION) < 0;
        if (opt == '?') return 2;
        if (set_option(&a, opt, optarg) != HT_OK) return fail(HT_ERR_ARG);
    }
    if (!a.session.path || optind < argc) {
        fputs(a.session.path ? "hybridgen: unexpected argument; try --help\n"
                             : "hybridgen: --model is missing; try --help\n",
              stderr);
        return 2;
    }
    signal(SIGINT, on_interrupt); // stop generating, print what is there
    HT_TRY_GOTO(st, done, ht_session_open(&session, &a.session));
    HT_TRY_GOTO(st, done, generate(&session, &a));
done:
    ht_session_close(&session);
    return st == HT_OK ? 0 : fail(st);
}
