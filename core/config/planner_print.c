/* core/config/planner_print.c: the table of `hybridtrain --plan`. */
#include <inttypes.h>

#include "core/config/linears.h"
#include "core/config/planner.h"

/* 1234567 -> "1.23 M" */
static const char *human(char out[32], double v)
{
    static const char *const units[] = { "", " K", " M", " G", " T", " P", " E" };
    size_t u = 0;

    while (v >= 999.5 && u + 1 < sizeof units / sizeof *units) {
        v /= 1000.0;
        u++;
    }
    snprintf(out, 32, u ? "%.3g%s" : "%.0f%s", v, units[u]);
    return out;
}

static const char *duration(char out[32], double s)
{
    if (s < 1.0)
        snprintf(out, 32, "%.0f ms", s * 1e3);
    else if (s < 120.0)
        snprintf(out, 32, "%.3g s", s);
    else if (s < 7200.0)
        snprintf(out, 32, "%.1f min", s / 60.0);
    else if (s < 2.0 * 86400.0)
        snprintf(out, 32, "%.1f h", s / 3600.0);
    else
        snprintf(out, 32, "%.1f days", s / 86400.0);
    return out;
}

static void print_layers(FILE *f, const struct ht_model_config *m)
{
    int64_t n_attention = 0;

    for (int64_t i = 0; i < m->n_layers; i++) n_attention += m->layer_kind[i] == HT_LAYER_ATTENTION;
    fprintf(f, "  %" PRId64 " layers: %" PRId64 " Mamba-2, %" PRId64 " attention", m->n_layers,
            m->n_layers - n_attention, n_attention);
    for (int64_t i = 0, listed = 0; n_attention < m->n_layers && i < m->n_layers; i++)
        if (m->layer_kind[i] == HT_LAYER_ATTENTION)
            fprintf(f, "%s%" PRId64, listed++ ? ", " : " (", i);
    fputs(n_attention && n_attention < m->n_layers ? ")\n" : "\n", f);
    fprintf(f, "  d_model %" PRId64 ", d_ff %" PRId64 ", vocabulary %" PRId64 "%s\n", m->d_model,
            m->d_ff, m->vocab_size, m->tied_head ? ", tied head" : "");
    if (n_attention < m->n_layers)
        fprintf(f,
                "  scan: %" PRId64 " heads of %" PRId64 ", state %" PRId64 ", %" PRId64
                " group(s), chunk %" PRId64 "\n",
                m->ssm_heads, m->ssm_d_head, m->d_state, m->n_groups, m->chunk);
    if (n_attention)
        fprintf(f,
                "  attention: %" PRId64 " heads of %" PRId64 ", %" PRId64
                " for keys and values, %" PRId64 " rotary dimensions\n",
                m->n_heads, m->d_head, m->n_kv_heads, m->rope_dims);
}

static void print_bytes(FILE *f, const char *what, int64_t n)
{
    fprintf(f, "  %-22s %12.1f MiB\n", what, (double)n / 1048576.0);
}

void ht_plan_print(FILE *f, const struct ht_plan *p, const struct ht_config *c)
{
    const struct ht_device_model *d = &p->device;
    const struct ht_plan_bytes *b = &p->bytes;
    char s[6][32];

    fprintf(f, "%s\n\nModel\n", c->train.name);
    fprintf(f, "  %" PRId64 " parameters (%s) in %" PRId64 " tensors\n", p->n_params,
            human(s[0], (double)p->n_params), p->n_tensors);
    print_layers(f, &c->model);
    fprintf(f, "  FLOPs per token: %s forward, %s training, at sequence length %" PRId64 "\n",
            human(s[0], p->flops_forward), human(s[1], p->flops_train), c->data.seq_len);

    fprintf(f, "\nRun\n  %s tokens in %" PRId64 " steps of %" PRId64 " tokens\n",
            human(s[0], p->total_tokens), p->total_steps, p->tokens_per_step);
    fprintf(f,
            "  %" PRId64 " rank(s), each %" PRId64 " pass(es) of %" PRId64 " x %" PRId64
            " tokens a step; ZeRO stage %d\n",
            p->n_ranks, p->n_micro_steps, c->train.micro_batch, c->data.seq_len,
            c->parallel.zero_stage);
    fprintf(f, "  %s FLOPs in all\n", human(s[0], p->flops_train * p->total_tokens));

    fputs("\nMemory per rank\n", f);
    print_bytes(f, "weights", b->weights);
    if (c->train.linear_dtype == HT_LINEAR_FP8) {
        const struct ht_fp8_bytes fp8 = ht_fp8_sizes(
            &c->model, c->train.micro_batch * c->data.seq_len, c->parallel.zero_stage < 3);
        print_bytes(f, "  of them fp8 copies", fp8.total);
    }
    print_bytes(f, "gradients", b->gradients);
    print_bytes(f, "optimizer", b->optimizer);
    print_bytes(f, "activations", b->activations);
    print_bytes(f, "scratch", b->scratch);
    print_bytes(f, "buffers", b->buffers);
    print_bytes(f, "program", b->program);
    print_bytes(f, "total", b->total);
    fprintf(f, "  %-22s %12.1f MiB\n", "there is", d->memory_bytes / 1048576.0);

    fprintf(
        f,
        "\nPredicted on %s%s%s (per rank %sFLOP/s sustained of %sFLOP/s peak, memory %sB/s, link "
        "%sB/s)\n",
        d->name, d->level[0] ? " " : "", d->level, human(s[0], d->matmul_flops),
        human(s[1], d->peak_flops), human(s[2], d->memory_bytes_s), human(s[3], d->link_bytes_s));
    fprintf(f, "  rates: %s\n", d->basis);
    fprintf(f, "  step %s (%s of it collectives that nothing hides), %s tokens/s, MFU %.1f %%\n",
            duration(s[0], p->step_s), duration(s[2], p->comm_exposed_s),
            human(s[1], p->tokens_per_s), 100.0 * p->mfu);
    fprintf(f, "  whole run %s\n", duration(s[0], p->step_s * (double)p->total_steps));
}

static const char *recompute_name(enum ht_recompute r)
{
    return r == HT_RECOMPUTE_NONE ? "none" : r == HT_RECOMPUTE_FULL ? "full" : "selective";
}

/* ZeRO, recomputation, rows x passes, GiB, tokens/s, MFU */
static void print_choice(FILE *f, const struct ht_plan_choice *c, const char *mark)
{
    char s[32];

    fprintf(f, "   %d  %-9s %2" PRId64 " x %-3" PRId64 " %6.1f  %8s%s %5.1f %%", c->zero_stage,
            recompute_name(c->recompute), c->micro_batch, c->plan.n_micro_steps,
            (double)c->plan.bytes.total / 1073741824.0, human(s, c->plan.tokens_per_s), mark,
            100.0 * c->plan.mfu);
}

void ht_plan_print_cluster(FILE *f, const struct ht_plan_cluster *rows, int n_rows,
                           const struct ht_config *c)
{
    const struct ht_device_model *d = &rows[0].recipe.plan.device;
    bool other_batch = false;

    fprintf(f,
            "\nClusters of %s, %.0f GB each, 8 a host: the recipe as it is, and the fastest that "
            "fits\n",
            d->name, d->memory_bytes / 1e9);
    fputs("           ZeRO recompute rows x passes  GiB  tokens/s    MFU\n", f);
    for (int i = 0; i < n_rows; i++) {
        const struct ht_plan_choice *r = &rows[i].recipe, *b = &rows[i].best;
        const bool other = r->global_batch_tokens != c->train.global_batch_tokens;
        other_batch = other_batch || other;
        fprintf(f, "  %4d recipe", rows[i].n_ranks);
        print_choice(f, r, other ? "*" : " ");
        fputs(r->fits ? "  fits\n" : "  DOES NOT FIT\n", f);
        fputs("      fastest", f);
        if (b->fits) {
            const bool raised = b->global_batch_tokens != c->train.global_batch_tokens;
            other_batch = other_batch || raised;
            print_choice(f, b, raised ? "*" : " ");
            fputc('\n', f);
        } else {
            fputs("   nothing fits\n", f);
        }
    }
    if (other_batch)
        fprintf(f, "  * with more tokens a step, the next number that ranks and rows divide: set "
                   "train.global_batch_tokens\n");
}
