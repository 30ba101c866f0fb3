/* training/metrics.c: one record per step, in three places. */
#include "training/metrics.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "core/base/file.h"
#include "training/metrics_file.h"
#include "training/tensorboard.h"

enum { MAX_VALUES = 24, LINE_BYTES = 2048 };

/* The values of one record, in the order of the file. */
struct record {
    int n;
    const char *tags[MAX_VALUES];
    double values[MAX_VALUES];
};

/* Sums since the last log line. */
struct window {
    int64_t n_steps;
    double loss, tokens, flops, step_s, data_wait_s, comm_exposed_s, stall_s;
};

struct ht_metrics {
    struct ht_metrics_options o;
    struct ht_log file_log; // log lines while a progress line owns the terminal
    int fd;
    char path[PATH_MAX];
    bool torn, warned_file, warned_board; // the last write stopped within a line
    struct ht_tensorboard *board;
    struct window window;
    bool on_terminal, line_shown;
    double last_time_s, s_per_step; // smoothed, with all pauses, for the time left
};

/* ---- text ---- */

char *ht_metrics_si(char text[16], double value)
{
    static const char prefixes[] = " kMGTPE";
    int i = 0;

    while (fabs(value) >= 999.5 && prefixes[i + 1]) {
        value /= 1000;
        i++;
    }
    const int digits = fabs(value) >= 99.95 ? 0 : fabs(value) >= 9.995 ? 1 : 2;
    if (i == 0)
        snprintf(text, 16, "%.*f ", digits, value);
    else
        snprintf(text, 16, "%.*f %c", digits, value, prefixes[i]);
    return text;
}

char *ht_metrics_bytes(char text[16], uint64_t n_bytes)
{
    static const char *const units[] = { "B", "KiB", "MiB", "GiB", "TiB", "PiB" };
    double value = (double)n_bytes;
    size_t i = 0;

    while (value >= 1023.5 && i + 1 < sizeof units / sizeof *units) {
        value /= 1024;
        i++;
    }
    snprintf(text, 16, "%.*f %s", i == 0 || value >= 99.95 ? 0 : 1, value, units[i]);
    return text;
}

char *ht_metrics_duration(char text[48], double seconds)
{
    const int64_t s = seconds > 0 && seconds < 1e12 ? (int64_t)(seconds + 0.5) : 0;
    const int64_t days = s / 86400, hours = s / 3600, minutes = s / 60 % 60;

    if (days > 0)
        snprintf(text, 48, "%" PRId64 " d %02" PRId64 ":%02" PRId64, days, hours % 24, minutes);
    else if (hours > 0)
        snprintf(text, 48, "%" PRId64 ":%02" PRId64 ":%02" PRId64, hours, minutes, s % 60);
    else
        snprintf(text, 48, "%" PRId64 ":%02" PRId64, minutes, s % 60);
    return text;
}

/* ---- metrics.jsonl and TensorBoard ---- */

static void put(struct record *r, const char *tag, double value)
{
    r->tags[r->n] = tag;
    r->values[r->n++] = value;
}

static void write_line(struct ht_metrics *m, int64_t step, int64_t tokens, double time_s,
                       const struct record *r)
{
    char line[LINE_BYTES];
    size_t n = 0;

    if (m->torn) line[n++] = '\n'; // ends the half line that a full disk left
    n += (size_t)snprintf(line + n, sizeof line - n,
                          "{\"step\": %" PRId64 ", \"tokens\": %" PRId64 ", \"time\": %.3f", step,
                          tokens, time_s);
    for (int i = 0; i < r->n; i++) {
        const double v = r->values[i];
        // counts in full, measurements to float precision; JSON has no NaN
        const char *format = !isfinite(v)                     ? ", \"%s\": null"
                             : v == rint(v) && fabs(v) < 1e15 ? ", \"%s\": %.0f"
                                                              : ", \"%s\": %.9g";
        n += (size_t)snprintf(line + n, sizeof line - n, format, r->tags[i], v);
    }
    n += (size_t)snprintf(line + n, sizeof line - n, "}\n");

    ssize_t w;
    do w = write(m->fd, line, n);
    while (w < 0 && errno == EINTR);
    const int error = errno;
    if (w != (ssize_t)n && !m->warned_file) {
        ht_metrics_clear_line(m);
        HT_WARN(m->o.log, "%s: %s; training goes on without", m->path,
                w < 0 ? strerror(error) : "the disk is full");
        m->warned_file = true;
    }
    if (w > 0) m->torn = w != (ssize_t)n;
}

static void write_record(struct ht_metrics *m, int64_t step, int64_t tokens, const struct record *r)
{
    const double now = ht_time_wall_s();

    write_line(m, step, tokens, now, r);
    if (m->board &&
        ht_tensorboard_scalars(m->board, now, step, r->n, r->tags, r->values) != HT_OK &&
        !m->warned_board) {
        ht_metrics_clear_line(m);
        HT_WARN(m->o.log, "%s; training goes on without", ht_error_message());
        m->warned_board = true;
    }
}

/* ---- the terminal ---- */

void ht_metrics_clear_line(struct ht_metrics *m)
{
    if (!m || !m->line_shown) return;
    fputs("\r\033[K", m->o.log->terminal);
    fflush(m->o.log->terminal);
    m->line_shown = false;
}

static double seconds_left(const struct ht_metrics *m, int64_t step)
{
    return (double)(m->o.total_steps - step) * m->s_per_step;
}

/* step 120/2000 [=====>        ] loss 3.412  12.3 k tokens/s  45.6 GFLOP/s  1.2 GiB  1:23 left */
static void show_progress(struct ht_metrics *m, const struct ht_step_metrics *s, uint64_t resident)
{
    enum { BAR = 20 };
    char line[512], bar[BAR + 1], speed[16], flops[16], memory[16], left[48];
    struct winsize size = { 0 };
    FILE *f = m->o.log->terminal;

    const double share = m->o.total_steps > 0 ? (double)s->step / (double)m->o.total_steps : 1;
    const int filled = share >= 1 ? BAR : (int)(share * BAR);
    for (int i = 0; i < BAR; i++) bar[i] = i < filled ? '=' : i == filled ? '>' : ' ';
    bar[BAR] = '\0';
    int n = snprintf(line, sizeof line, "step %" PRId64 "/%" PRId64 " [%s] loss %.4f  %stokens/s",
                     s->step, m->o.total_steps, bar, s->loss,
                     ht_metrics_si(speed, (double)s->step_tokens / s->step_s));
    if (s->step_flops > 0)
        n += snprintf(line + n, sizeof line - (size_t)n, "  %sFLOP/s",
                      ht_metrics_si(flops, s->step_flops / s->step_s));
    n += snprintf(line + n, sizeof line - (size_t)n, "  %s  %s left",
                  ht_metrics_bytes(memory, resident),
                  ht_metrics_duration(left, seconds_left(m, s->step)));

    int width = ioctl(fileno(f), TIOCGWINSZ, &size) == 0 && size.ws_col > 1 ? size.ws_col - 1 : 79;
    if (width > n) width = n; // a line that wraps cannot be taken back
    fprintf(f, "\r%.*s\033[K", width, line);
    fflush(f);
    m->line_shown = true;
}

static void log_step(struct ht_metrics *m, const struct ht_step_metrics *s, uint64_t resident)
{
    const struct window *w = &m->window;
    char text[512], speed[16], flops[16], memory[16], left[48];

    int n = snprintf(text, sizeof text,
                     "step %" PRId64 "/%" PRId64 "  loss %.4f  grad norm %.3g  lr %.3g  %stokens/s",
                     s->step, m->o.total_steps, w->loss / (double)w->n_steps, s->grad_norm, s->lr,
                     ht_metrics_si(speed, w->tokens / w->step_s));
    if (w->flops > 0)
        n += snprintf(text + n, sizeof text - (size_t)n, "  %sFLOP/s",
                      ht_metrics_si(flops, w->flops / w->step_s));
    n += snprintf(text + n, sizeof text - (size_t)n, "  step %.3g s (data %.0f%%, comm %.0f%%)",
                  w->step_s / (double)w->n_steps, 100 * w->data_wait_s / w->step_s,
                  100 * w->comm_exposed_s / w->step_s);
    if (w->stall_s > 0)
        n += snprintf(text + n, sizeof text - (size_t)n, "  checkpoint stall %.3g s", w->stall_s);
    if (s->skipped_steps > 0)
        n += snprintf(text + n, sizeof text - (size_t)n, "  skipped %" PRId64, s->skipped_steps);
    snprintf(text + n, sizeof text - (size_t)n, "  %s  %s left", ht_metrics_bytes(memory, resident),
             ht_metrics_duration(left, seconds_left(m, s->step)));
    HT_INFO(m->on_terminal ? &m->file_log : m->o.log, "%s", text);
}

/* ---- interface ---- */

enum ht_status ht_metrics_open(struct ht_metrics **out, const struct ht_metrics_options *o)
{
    enum ht_status st = HT_OK;
    struct ht_metrics *m = calloc(1, sizeof *m);
    const char *term = getenv("TERM");

    *out = NULL;
    if (!m) return HT_FAIL(HT_ERR_MEMORY, "%s: no memory for metrics", o->dir);
    m->o = *o;
    m->fd = -1;
    if (snprintf(m->path, sizeof m->path, "%s/metrics.jsonl", o->dir) >= (int)sizeof m->path) {
        st = HT_FAIL(HT_ERR_ARG, "%s: path is too long", o->dir);
        goto done;
    }
    HT_TRY_GOTO(st, done, ht_metrics_file_supersede(m->path, o->start_step));
    m->fd = open(m->path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    if (m->fd < 0) {
        st = HT_FAIL(HT_ERR_IO, "%s: %s", m->path, strerror(errno));
        goto done;
    }
    if (o->tensorboard)
        HT_TRY_GOTO(st, done, ht_tensorboard_open(&m->board, o->dir, o->start_step));
    if (o->log) {
        m->file_log = *o->log;
        m->file_log.terminal = NULL;
        m->on_terminal = o->log->terminal && o->log->level <= HT_LOG_INFO &&
                         isatty(fileno(o->log->terminal)) && !(term && strcmp(term, "dumb") == 0);
    }
    m->last_time_s = ht_time_s();
    *out = m;
    m = NULL;
done:
    ht_metrics_close(m);
    return st;
}

static void window_add(struct window *w, const struct ht_step_metrics *s)
{
    w->n_steps++;
    w->loss += s->loss;
    w->tokens += (double)s->step_tokens;
    w->flops += s->step_flops;
    w->step_s += s->step_s;
    w->data_wait_s += s->data_wait_s;
    w->comm_exposed_s += s->comm_exposed_s;
    w->stall_s += s->checkpoint_stall_s;
}

void ht_metrics_step(struct ht_metrics *m, const struct ht_step_metrics *step)
{
    struct record r = { 0 };

    if (!m) return;
    struct ht_step_metrics s = *step;
    if (s.step_s <= 0) s.step_s = 1e-9; // a clock's tick; only speeds use it
    if (s.resident_bytes == 0) s.resident_bytes = ht_memory_resident_bytes();
    if (s.peak_bytes == 0) s.peak_bytes = ht_memory_peak_bytes();
    const double speed = (double)s.step_tokens / s.step_s;

    put(&r, "train/loss", s.loss);
    if (s.z_loss != 0) put(&r, "train/z_loss", s.z_loss);
    put(&r, "train/grad_norm", s.grad_norm);
    put(&r, "train/learning_rate", s.lr);
    put(&r, "train/tokens", (double)s.tokens);
    put(&r, "train/tokens_per_second", speed);
    put(&r, "train/tokens_per_second_per_device", speed / (m->o.n_ranks > 0 ? m->o.n_ranks : 1));
    if (s.step_flops > 0) {
        put(&r, "train/flops_per_second", s.step_flops / s.step_s);
        if (m->o.peak_flops > 0) put(&r, "train/mfu", s.step_flops / s.step_s / m->o.peak_flops);
    }
    put(&r, "train/step_seconds", s.step_s);
    put(&r, "train/data_wait_seconds", s.data_wait_s);
    put(&r, "train/comm_exposed_seconds", s.comm_exposed_s);
    put(&r, "train/checkpoint_stall_seconds", s.checkpoint_stall_s);
    put(&r, "train/skipped_steps", (double)s.skipped_steps);
    put(&r, "memory/resident_bytes", (double)s.resident_bytes);
    put(&r, "memory/peak_bytes", (double)s.peak_bytes);
    write_record(m, s.step, s.tokens, &r);

    // Time left counts evaluations and checkpoints too: from call to call, over some twenty steps.
    const double now = ht_time_s(), took = now - m->last_time_s;
    m->s_per_step = m->s_per_step > 0 ? m->s_per_step + (took - m->s_per_step) / 20 : s.step_s;
    m->last_time_s = now;
    window_add(&m->window, &s);
    if (m->o.log_every > 0 && (s.step % m->o.log_every == 0 || s.step == m->o.total_steps)) {
        log_step(m, &s, s.resident_bytes);
        m->window = (struct window){ 0 };
    }
    if (m->on_terminal) show_progress(m, &s, s.resident_bytes);
}

void ht_metrics_eval(struct ht_metrics *m, const struct ht_eval_metrics *e)
{
    struct record r = { 0 };

    if (!m) return;
    put(&r, "eval/loss", e->loss);
    put(&r, "eval/perplexity", exp(e->loss));
    if (e->bits_per_byte > 0) put(&r, "eval/bits_per_byte", e->bits_per_byte);
    put(&r, "eval/labels", (double)e->n_labels);
    put(&r, "eval/seconds", e->seconds);
    write_record(m, e->step, e->tokens, &r);

    char extra[48] = "";
    if (e->bits_per_byte > 0)
        snprintf(extra, sizeof extra, "  %.4f bits per byte", e->bits_per_byte);
    ht_metrics_clear_line(m);
    HT_INFO(m->o.log, "evaluation at step %" PRId64 ": loss %.4f  perplexity %.2f%s  (%.1f s)",
            e->step, e->loss, exp(e->loss), extra, e->seconds);
}

void ht_metrics_close(struct ht_metrics *m)
{
    if (!m) return;
    if (m->line_shown) { // the last state stays readable
        fputc('\n', m->o.log->terminal);
        fflush(m->o.log->terminal);
    }
    ht_tensorboard_close(m->board);
    if (m->fd >= 0) close(m->fd);
    free(m);
}
