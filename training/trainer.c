/* training/trainer.c: the loop. Every step: gradients, their sum, new weights (training/step.c),
 * then metrics, evaluation, checkpoint, and a look whether somebody wants the run to stop. */
#include "training/trainer.h"

#include <stdio.h>

#include "core/base/file.h"
#include "core/config/planner.h"
#include "training/metrics.h"
#include "training/plot.h"
#include "training/run.h"
#include "training/signals.h"

static bool due(int64_t step, int64_t every)
{
    return every > 0 && step % every == 0;
}

static void report(struct ht_run *r, struct ht_metrics *metrics, const struct ht_step_result *step,
                   double stall_s)
{
    const double flops =
        3.0 * ht_flops_forward(&r->cfg->model, step->attended) * (double)step->tokens;

    ht_metrics_step(metrics, &(struct ht_step_metrics){ .step = r->step,
                                                        .tokens = r->tokens,
                                                        .loss = step->loss,
                                                        .z_loss = step->z_loss,
                                                        .grad_norm = step->grad_norm,
                                                        .lr = step->lr,
                                                        .step_tokens = step->tokens,
                                                        .step_flops = flops,
                                                        .step_s = step->step_s,
                                                        .data_wait_s = step->data_wait_s,
                                                        .comm_exposed_s = step->comm_exposed_s,
                                                        .checkpoint_stall_s = stall_s,
                                                        .skipped_steps = r->skipped });
    if (step->skipped) {
        ht_metrics_clear_line(metrics);
        HT_WARN(r->log,
                "step %lld: loss %g, gradient norm %g: weights left as they were (%lld in a row)",
                (long long)r->step, step->loss, step->grad_norm, (long long)r->skipped_in_row);
    }
}

/* *stop gets the signal that cut the evaluation short: then there is no result. */
static enum ht_status evaluate(struct ht_run *r, struct ht_metrics *metrics, int64_t *stop)
{
    const double start_s = ht_time_s();
    struct ht_eval_result result;

    if (!r->eval_loader) return HT_OK;
    HT_TRY(ht_run_evaluate(r, &result));
    *stop = result.cut_by;
    if (*stop) {
        ht_metrics_clear_line(metrics);
        HT_INFO(r->log, "%s: the evaluation at step %lld is cut short and not recorded",
                ht_signals_name((int)*stop), (long long)r->step);
        return HT_OK;
    }
    ht_metrics_eval(metrics, &(struct ht_eval_metrics){ .step = r->step,
                                                        .tokens = r->tokens,
                                                        .loss = result.loss,
                                                        .bits_per_byte = result.bits_per_byte,
                                                        .n_labels = result.n_counted,
                                                        .seconds = ht_time_s() - start_s });
    return HT_OK;
}

static enum ht_status save(struct ht_run *r, double *stall_s)
{
    HT_TRY(ht_run_save(r, stall_s));
    r->saved = r->step;
    ht_run_pause_point(r, "save");
    return HT_OK;
}

static enum ht_status loop(struct ht_run *r, struct ht_metrics *metrics)
{
    const struct ht_config *c = r->cfg;
    int64_t stop = 0, published;
    double stall_s = 0.0;

    while (r->step < c->train.total_steps && !stop) {
        struct ht_step_result step;
        HT_TRY(ht_run_step(r, &step));
        report(r, metrics, &step, stall_s);
        stall_s = 0.0;
        if (r->skipped_in_row >= c->train.max_bad_steps)
            return HT_FAIL(HT_ERR_NUMERIC,
                           "step %lld: loss or gradient not finite in %lld steps in a row "
                           "(train.max_bad_steps); the last checkpoint is from before",
                           (long long)r->step, (long long)r->skipped_in_row);
        if (due(r->step, c->eval.every_steps) && r->step < c->train.total_steps)
            HT_TRY(evaluate(r, metrics, &stop));
        if (due(r->step, c->checkpoint.every_steps) && r->skipped_in_row == 0)
            HT_TRY(save(r, &stall_s));
        HT_TRY(ht_ckpt_poll(r->writer, &published));
        if (!stop) HT_TRY(ht_run_agree_to_stop(r, &stop));
    }
    if (stop) {
        ht_metrics_clear_line(metrics);
        HT_INFO(r->log, "%s: stopping after step %lld", ht_signals_name((int)stop),
                (long long)r->step);
    }
    // written while the last evaluation runs
    if (r->saved != r->step && r->step > 0) HT_TRY(save(r, &stall_s));
    if (!stop) HT_TRY(evaluate(r, metrics, &stop));
    ht_run_pause_point(r, "finish");
    HT_TRY(ht_ckpt_finish(r->writer));
    if (stop)
        return HT_FAIL(HT_ERR_STOPPED,
                       "stopped on %s; checkpoint of step %lld saved, start again to go on",
                       ht_signals_name((int)stop), (long long)r->step);
    return HT_OK;
}

static enum ht_status finish(struct ht_run *r)
{
    if (ht_comm_rank(r->comm) != 0) return HT_OK;
    HT_INFO(r->log, "done: %lld steps, %lld tokens, checkpoints in %s", (long long)r->step,
            (long long)r->tokens, r->checkpoint_dir);
    if (!r->cfg->log.plot) return HT_OK;
    // a missing gnuplot or a full disk must not turn a finished run into a failed one
    if (ht_plot_loss(r->dir, r->cfg->train.name) != HT_OK)
        HT_WARN(r->log, "no loss curve: %s", ht_error_message());
    return HT_OK;
}

enum ht_status ht_train(const struct ht_config *cfg, const struct ht_recipe *recipe,
                        struct ht_comm *comm, const struct ht_log *log)
{
    struct ht_metrics *metrics = NULL;
    struct ht_run *r = NULL;
    enum ht_status st = HT_OK;

    HT_TRY_GOTO(st, done, ht_run_create(&r, cfg, recipe, comm, log));
    if (ht_comm_rank(comm) == 0)
        HT_TRY_GOTO(st, done,
                    ht_metrics_open(&metrics, &(struct ht_metrics_options){
                                                  .dir = r->dir,
                                                  .start_step = r->step,
                                                  .total_steps = cfg->train.total_steps,
                                                  .log_every = cfg->log.every_steps,
                                                  .n_ranks = ht_comm_size(comm),
                                                  .tensorboard = cfg->log.tensorboard,
                                                  .log = log }));
    HT_TRY_GOTO(st, done, loop(r, metrics));
    ht_metrics_close(metrics);
    metrics = NULL;
    HT_TRY_GOTO(st, done, finish(r));
done:
    ht_metrics_close(metrics);
    ht_run_free(r);
    return st;
}
