/* programs/hybridconvert.c: weights from one kind of folder to another. Argument parsing and
 * printing, nothing else. */
#include <getopt.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoints/weights_quant.h"
#include "checkpoints/weights_save.h"
#include "core/base/backend.h"
#include "core/base/file.h"
#include "core/base/thread.h"

static const char help[] =
    "Usage: hybridconvert SOURCE TARGET [options]\n"
    "\n"
    "Write the weights of SOURCE (a run folder, a checkpoint, a folder of this program, or a "
    "folder in\n"
    "Hugging Face form) to TARGET, a new folder.\n"
    "\n"
    "  --to h5                 our own form (default): weights.h5, weights.json with the hash of "
    "every\n"
    "                          dataset, and the source's config and tokenizer files\n"
    "  --to safetensors        Hugging Face form: config.json, model.safetensors, tokenizer "
    "files.\n"
    "                          Quantised weights are turned back into plain numbers\n"
    "  --quantize FORMAT       int8, int4, int4z (with zero points), fp8 (e4m3) or bf16; with\n"
    "                          --to h5. The head is int8 where FORMAT is int4, int4z or fp8, the\n"
    "                          embedding bf16 (unless it is the head as well), norms, convolution, "
    "A, D and dt fp32\n"
    "  --group N               32 or 64 neighbours share a scale (default 32)\n"
    "  --dtype TYPE            fp32 or bf16 of the matrices that are not quantised (default: as "
    "stored;\n"
    "                          fp32 for fp16)\n"
    "  --threads N             threads (default: all cores)\n"
    "  --quiet                 print nothing when all goes well\n"
    "  --version, --help\n"
    "\n"
    "Exit codes: 0 done, 1 failure at run time, 2 usage, 3 bad model or input, 5 out of memory or "
    "disk.\n";

enum option_code {
    O_TO = 256,
    O_QUANTIZE,
    O_GROUP,
    O_DTYPE,
    O_THREADS,
    O_QUIET,
    O_VERSION,
    O_HELP
};

struct arguments {
    struct ht_weights_save_options save;
    const char *source, *target;
    bool safetensors, dtype_given, quiet;
    int threads;
};

static int fail(enum ht_status st)
{
    fprintf(stderr, "hybridconvert: %s\n", ht_error_message());
    return ht_exit_code(st);
}

static enum ht_status parse_int(int *out, const char *name, const char *text, long low, long high)
{
    char *end;
    const long v = strtol(text, &end, 10);
    if (*end || end == text || v < low || v > high)
        return HT_FAIL(HT_ERR_ARG, "--%s is '%.40s'; it must be from %ld to %ld", name, text, low,
                       high);
    *out = (int)v;
    return HT_OK;
}

static enum ht_status set_option(struct arguments *a, int code, const char *value)
{
    switch (code) {
    case O_TO:
        a->safetensors = strcmp(value, "safetensors") == 0;
        if (a->safetensors || strcmp(value, "h5") == 0) return HT_OK;
        return HT_FAIL(HT_ERR_ARG, "--to is '%.40s'; it must be h5 or safetensors", value);
    case O_QUANTIZE: a->save.quantise = true; return ht_qformat_parse(&a->save.format, value);
    case O_GROUP:
        HT_TRY(parse_int(&a->save.group, "group", value, 32, 64));
        if (a->save.group == 32 || a->save.group == 64) return HT_OK;
        return HT_FAIL(HT_ERR_ARG, "--group is %d; it must be 32 or 64", a->save.group);
    case O_DTYPE:
        a->dtype_given = true;
        a->save.dtype = strcmp(value, "bf16") == 0 ? HT_DTYPE_BF16 : HT_DTYPE_F32;
        if (a->save.dtype == HT_DTYPE_BF16 || strcmp(value, "fp32") == 0) return HT_OK;
        return HT_FAIL(HT_ERR_ARG, "--dtype is '%.40s'; it must be fp32 or bf16", value);
    case O_THREADS: return parse_int(&a->threads, "threads", value, 1, 1024);
    case O_QUIET: a->quiet = true; break;
    }
    return HT_OK;
}

static enum ht_status convert(struct arguments *a, const struct ht_log *log)
{
    struct ht_weights_save_report r;
    struct ht_weights *w = NULL;
    struct ht_backend be = { 0 };
    enum ht_status st = HT_OK;
    const double start_s = ht_time_s();

    HT_TRY(ht_backend_create_cpu(&be, a->threads, 0)); // how many threads there are
    a->save.n_threads = be.n_threads;
    a->save.log = log;
    HT_TRY_GOTO(st, done, ht_weights_open(&w, a->source, log));
    if (!a->dtype_given)
        a->save.dtype = ht_weights_stored_dtype(w) == HT_DTYPE_BF16 ? HT_DTYPE_BF16 : HT_DTYPE_F32;
    if (a->safetensors)
        HT_TRY_GOTO(st, done, ht_weights_save_safetensors(w, a->target, &a->save, &r));
    else
        HT_TRY_GOTO(st, done, ht_weights_save_h5(w, a->target, &a->save, &r));
    if (a->quiet) goto done;
    printf("%s: %" PRId64 " parameters, %.1f MiB, %.2f bits per parameter, %.1f s\n", a->target,
           r.n_params, (double)r.n_bytes / 1048576.0, 8.0 * (double)r.n_bytes / (double)r.n_params,
           ht_time_s() - start_s);
    if (a->save.quantise && r.error > 0.0)
        printf("relative error of the quantised matrices: %.5f; worst %.5f (%s)\n", r.error,
               r.worst, r.worst_name);
done:
    ht_weights_close(w);
    ht_backend_free(&be);
    return st;
}

int main(int argc, char **argv)
{
    static const struct option options[] = {
        { "to", 1, NULL, O_TO },
        { "quantize", 1, NULL, O_QUANTIZE },
        { "quantise", 1, NULL, O_QUANTIZE },
        { "group", 1, NULL, O_GROUP },
        { "dtype", 1, NULL, O_DTYPE },
        { "threads", 1, NULL, O_THREADS },
        { "quiet", 0, NULL, O_QUIET },
        { "version", 0, NULL, O_VERSION },
        { "help", 0, NULL, O_HELP },
        { NULL, 0, NULL, 0 },
    };
    const struct ht_log log = { .level = HT_LOG_WARN, .terminal = stderr };
    struct arguments a = { .save = { .group = HT_Q_DEFAULT_GROUP } };
    int opt;

    ht_thread_limit_spinning(argv);
    while ((opt = getopt_long(argc, argv, "h", options, NULL)) != -1) {
        if (opt == O_HELP || opt == 'h') return fputs(help, stdout) < 0;
        if (opt == O_VERSION) return printf("hybridconvert %s\n", HT_VERSION) < 0;
        if (opt == '?') return 2;
        if (set_option(&a, opt, optarg) != HT_OK) return fail(HT_ERR_ARG);
    }
    if (argc - optind != 2) {
        fputs("hybridconvert: give SOURCE and TARGET; try --help\n", stderr);
        return 2;
    }
    a.source = argv[optind];
    a.target = argv[optind + 1];
    const enum ht_status st = convert(&a, &log);
    return st == HT_OK ? 0 : fail(st);
}
