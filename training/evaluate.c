/* training/evaluate.c: loss on held-out data. Padding rows carry no labels and count for nothing.
 */
#include <math.h>

#include "training/run.h"

enum ht_status ht_run_evaluate(struct ht_run *r, struct ht_eval_result *out)
{
    const int64_t limit = r->cfg->eval.max_tokens;
    const bool last = r->step == r->cfg->train.total_steps;
    double sums[2] = { 0.0, 0.0 }; // loss, labels counted
    int64_t seen = 0;
    bool complete = true;

    *out = (struct ht_eval_result){ 0 };
    if (!r->eval_loader) return HT_OK;
    HT_TRY(ht_loader_rewind(r->eval_loader));
    for (;;) {
        const struct ht_batch *batch = NULL;
        struct ht_loss loss;
        HT_TRY(ht_loader_next(r->eval_loader, &batch, NULL));
        if (!batch) break;
        ht_run_pause_point(r, last ? "last-evaluate" : "evaluate");
        HT_TRY(ht_run_agree_to_stop(r, &out->cut_by));
        if (out->cut_by) return HT_OK;
        struct ht_model_batch b;
        HT_TRY(ht_run_put_batch(r, &b, batch));
        HT_TRY(ht_model_evaluate(r->model, r->acts, &b, &loss, NULL));
        sums[0] += loss.loss_sum;
        sums[1] += (double)loss.n_counted;
        seen += batch->n_tokens * ht_comm_size(r->comm);
        if (limit > 0 && seen >= limit) { // the same on every rank: all see equally many batches
            complete = false;
            break;
        }
    }
    HT_TRY(ht_comm_sum_f64(r->comm, sums, 2));
    const double bytes = (double)ht_loader_text_bytes(r->eval_loader);
    out->n_counted = (int64_t)sums[1];
    out->loss = sums[1] > 0.0 ? sums[0] / sums[1] : 0.0;
    if (complete && bytes > 0.0) {
        // the first token of a document is not predicted: charged at one of vocab_size
        const double first = (double)ht_loader_n_tokens(r->eval_loader) - sums[1];
        const double nats = sums[0] + first * log((double)r->cfg->model.vocab_size);
        out->bits_per_byte = nats / log(2.0) / bytes;
    }
    return HT_OK;
}
