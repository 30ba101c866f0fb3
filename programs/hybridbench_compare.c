/* programs/hybridbench_compare.c: hybridbench compare. */
#include "programs/hybridbench_compare.h"

#include <errno.h>
#include <getopt.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "bench/hybridbench/compare.h"

static const char help[] =
    "Usage: hybridbench compare A B [options]\n"
    "       hybridbench compare --from FILE [--from FILE ...] [--json|--table|--plot ...]\n"
    "\n"
    "Two models on the same engine, in turn: decoding over context and batch, each at equal batch "
    "and at its\n"
    "own best one, and prefill behind a context; beside every figure what memory bandwidth and "
    "arithmetic of\n"
    "this machine, measured in the same run, allow. A and B: model folders, or recipes (random "
    "weights).\n"
    "\n"
    "  --weights FORMAT     bf16 (default), int8, int4, int4z, fp8\n"
    "  --contexts N,N,...   default 1024,4096,16384\n"
    "  --batches N,N,...    default 1,4,16,64; each model's largest is added\n"
    "  --memory SIZE        for one model's weights, states, keys and values (default 4G)\n"
    "  --rounds N           1 to 15 (default 3)\n"
    "  --seconds S          of one measurement at least (default 1)\n"
    "  --threads N          default: all cores\n"
    "  --json FILE          figures; - for standard output\n"
    "  --table FILE         Markdown (default: to standard output)\n"
    "  --plot PREFIX        PREFIX-decode, -equal and -latency, each .svg and .png\n"
    "  --from FILE          instead of A and B: figures of earlier --json files of other contexts, "
    "together\n"
    "  --help\n"
    "\n"
    "Exit codes: 0 done, 1 failure at run time, 2 usage, 3 bad model, 5 out of memory.\n";

enum { EXIT_USAGE = 2, MOST_FILES = HT_COMPARE_MOST };

/* "1024,4096": ascending numbers from 1. */
static enum ht_status parse_list(int64_t *out, int *n, const char *name, const char *text)
{
    char *end;

    for (*n = 0;; text = end + 1) {
        errno = 0;
        const long long v = strtoll(text, &end, 10);
        const bool ascends = *n == 0 || v > out[*n - 1];
        if (errno || end == text || (*end && *end != ',') || v < 1 || v > 1 << 24 || !ascends ||
            *n == HT_COMPARE_MOST)
            return HT_FAIL(HT_ERR_ARG, "%s: up to %d ascending numbers from 1 to %d, at \"%s\"",
                           name, HT_COMPARE_MOST, 1 << 24, text);
        out[(*n)++] = v;
        if (!*end) return HT_OK;
    }
}

static enum ht_status parse_size(double *out, const char *text)
{
    static const char units[] = "KMGT";
    char *end;
    double v = strtod(text, &end);
    const char *unit = *end ? strchr(units, *end) : NULL;

    if (unit)
        for (const char *u = units; u <= unit; u++) v *= 1024.0;
    if (end == text || (*end && (!unit || end[1])) || !(v > 0.0))
        return HT_FAIL(HT_ERR_ARG, "--memory: \"%s\" is not a size like 16G", text);
    *out = v;
    return HT_OK;
}

struct outputs {
    const char *json, *table, *plot;
    const char *from[MOST_FILES];
    int n_from;
};

static enum ht_status take(struct ht_compare_options *o, struct outputs *out, int option,
                           const char *text)
{
    int64_t v[HT_COMPARE_MOST];
    int n = 0;

    switch (option) {
    case 'w': o->weights = text; return HT_OK;
    case 'c': return parse_list(o->context, &o->n_contexts, "--contexts", text);
    case 'b': return parse_list(o->batch, &o->n_batches, "--batches", text);
    case 'm': return parse_size(&o->memory_bytes, text);
    case 'r':
    case 't':
        HT_TRY(parse_list(v, &n, option == 'r' ? "--rounds" : "--threads", text));
        if (n != 1 || v[0] > (option == 'r' ? HT_COMPARE_ROUNDS : 1024))
            return HT_FAIL(HT_ERR_ARG, "%s: one number up to %d",
                           option == 'r' ? "--rounds" : "--threads",
                           option == 'r' ? HT_COMPARE_ROUNDS : 1024);
        *(option == 'r' ? &o->rounds : &o->threads) = (int)v[0];
        return HT_OK;
    case 's':
        o->cell_s = atof(text);
        if (!(o->cell_s > 0.0 && o->cell_s < 3600.0))
            return HT_FAIL(HT_ERR_ARG, "--seconds: \"%s\" is not a time", text);
        return HT_OK;
    case 'j': out->json = text; return HT_OK;
    case 'T': out->table = text; return HT_OK;
    case 'p': out->plot = text; return HT_OK;
    case 'f':
        if (out->n_from == MOST_FILES)
            return HT_FAIL(HT_ERR_ARG, "--from: at most %d files", MOST_FILES);
        out->from[out->n_from++] = text;
        return HT_OK;
    default: return HT_FAIL(HT_ERR_ARG, "an option nobody takes");
    }
}

int ht_bench_compare(int argc, char **argv)
{
    static const struct option options[] = {
        { "weights", 1, NULL, 'w' }, { "contexts", 1, NULL, 'c' }, { "batches", 1, NULL, 'b' },
        { "memory", 1, NULL, 'm' },  { "rounds", 1, NULL, 'r' },   { "threads", 1, NULL, 't' },
        { "seconds", 1, NULL, 's' }, { "json", 1, NULL, 'j' },     { "table", 1, NULL, 'T' },
        { "plot", 1, NULL, 'p' },    { "from", 1, NULL, 'f' },     { "help", 0, NULL, 'h' },
        { NULL, 0, NULL, 0 },
    };
    struct ht_compare_options o = { .weights = "bf16",
                                    .memory_bytes = 4.0 * 1073741824.0,
                                    .n_contexts = 3,
                                    .context = { 1024, 4096, 16384 },
                                    .n_batches = 4,
                                    .batch = { 1, 4, 16, 64 },
                                    .rounds = 3,
                                    .cell_s = 1.0,
                                    .progress = stderr };
    static struct ht_compare_result result;
    struct outputs out = { 0 };
    enum ht_status st = HT_OK;
    int option;

    while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
        if (option == '?') return EXIT_USAGE;
        if (option == 'h') return fputs(help, stdout), 0;
        st = take(&o, &out, option, optarg);
        if (st != HT_OK) {
            fprintf(stderr, "hybridbench: %s\n", ht_error_message());
            return EXIT_USAGE;
        }
    }
    if (optind + (out.n_from ? 0 : 2) != argc) {
        fprintf(stderr, "hybridbench compare: %s; --help tells more\n",
                out.n_from ? "--from takes the place of models" : "two models are needed");
        return EXIT_USAGE;
    }
    if (out.n_from) {
        st = ht_compare_merge(&result, &o, out.from, out.n_from);
    } else {
        o.path[0] = argv[optind];
        o.path[1] = argv[optind + 1];
        st = ht_compare_run(&result, &o);
    }
    if (st == HT_OK && out.json) st = ht_compare_json(&result, &o, out.json);
    if (st == HT_OK && (out.table || !out.json))
        st = ht_compare_table(&result, &o, out.table ? out.table : "-");
    if (st == HT_OK && out.plot) st = ht_compare_plot(&result, &o, out.plot);
    if (st == HT_OK) return 0;
    fprintf(stderr, "hybridbench: %s\n", ht_error_message());
    return ht_exit_code(st);
}
