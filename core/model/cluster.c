/* core/model/cluster.c: see cluster.h. */
#include "core/model/cluster.h"

#include <stdlib.h>
#include <string.h>

#include "core/model/model.h"

enum ht_status ht_model_plan(struct ht_plan *out, const struct ht_config *c, int n_ranks,
                             const char *device_name)
{
    const struct ht_train_config *t = &c->train;
    struct ht_model_sizes sizes;
    enum ht_status st = HT_OK;

    HT_TRY(ht_model_sizes(&sizes, &c->model, t->precision, t->recompute, false,
                          t->micro_batch * c->data.seq_len, t->threads > 0 ? t->threads : 2));
    if (!device_name || !strcmp(device_name, "cpu")) {
        st = ht_plan_make(out, c, n_ranks, "cpu", sizes.activation_bytes, sizes.scratch_bytes);
        if (st == HT_OK || device_name) return st;
        device_name = "h100"; // too large for here
    }
    return ht_plan_make(out, c, n_ranks, device_name, sizes.activation_bytes,
                        sizes.scratch_cuda_bytes);
}

static int64_t round_up(int64_t n, int64_t a)
{
    return (n + a - 1) / a * a;
}

/* c is changed to what is tried. Not fitting is an answer, not an error. */
static enum ht_status try_choice(struct ht_plan_choice *out, struct ht_config *c, int n_ranks,
                                 const char *device_name, int64_t tokens)
{
    c->train.global_batch_tokens =
        round_up(tokens, c->train.micro_batch * c->data.seq_len * n_ranks);
    *out = (struct ht_plan_choice){ .global_batch_tokens = c->train.global_batch_tokens,
                                    .zero_stage = c->parallel.zero_stage,
                                    .recompute = c->train.recompute,
                                    .micro_batch = c->train.micro_batch };
    const enum ht_status st = ht_model_plan(&out->plan, c, n_ranks, device_name);
    out->fits = st == HT_OK;
    return st == HT_ERR_MEMORY ? HT_OK : st;
}

/* Faster by more than half a per cent; else the smaller stage, which comes first. */
static bool is_better(const struct ht_plan_choice *a, const struct ht_plan_choice *b,
                      int64_t tokens)
{
    const bool a_same = a->global_batch_tokens == tokens, b_same = b->global_batch_tokens == tokens;

    if (!a->fits || !b->fits) return a->fits;
    if (a_same != b_same) return a_same; // another batch is another run
    return a->plan.tokens_per_s > 1.005 * b->plan.tokens_per_s;
}

enum ht_status ht_model_plan_cluster(struct ht_plan_cluster *out, const struct ht_config *c,
                                     int n_ranks, const char *device_name)
{
    static const int64_t rows[] = { 1, 2, 3, 4, 6, 8 };
    const int64_t tokens = c->train.global_batch_tokens;
    struct ht_config *own = malloc(sizeof *own);
    enum ht_status st = HT_OK;

    *out = (struct ht_plan_cluster){ .n_ranks = n_ranks };
    if (!own) return HT_FAIL(HT_ERR_MEMORY, "no memory for a copy of the recipe");
    *own = *c;
    HT_TRY_GOTO(st, done, try_choice(&out->recipe, own, n_ranks, device_name, tokens));
    for (int stage = 1; stage <= 3; stage++)
        for (int r = HT_RECOMPUTE_NONE; r <= HT_RECOMPUTE_FULL; r++)
            for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
                struct ht_plan_choice choice;
                own->parallel.zero_stage = stage;
                own->train.recompute = (enum ht_recompute)r;
                own->train.micro_batch = rows[i];
                HT_TRY_GOTO(st, done, try_choice(&choice, own, n_ranks, device_name, tokens));
                if (is_better(&choice, &out->best, tokens)) out->best = choice;
            }
done:
    free(own);
    return st;
}
