/* distributed/comm_mpi.c: collectives over MPI, from non-blocking point-to-point messages.
 *
 * Every collective here is an exchange of each rank with each other: MPI moves bytes, the sums are
 * ours, in rank order. That costs what MPI's own linear algorithms cost, gives the same bits on
 * every run, and tells from whom a message is missing: only that rank is at fault, since the others
 * have sent theirs before they wait. The k-th collective of every rank is the same one, so its
 * number is the message tag.
 *
 * Waiting polls with MPI_Test and a growing pause: ranks may outnumber cores, and a blocking MPI
 * call neither yields the core nor ever returns when a peer hangs.
 */
#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <mpi.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "core/base/file.h"
#include "distributed/comm_impl.h"

#ifndef HT_COMM_MAX_MESSAGE           // tests lower it to see the splitting
#define HT_COMM_MAX_MESSAGE (1 << 30) // bytes; MPI counts are int
#endif

enum { HOST_BYTES = HT_COMM_HOST_BYTES, TAGS = 16384 }; // MPI promises tags to 32767

static ht_reduce_sum_fn *const sum_fns[HT_ISA_COUNT] = HT_ISA_ROW(ht_reduce_sum_cpu);
static ht_reduce_round_fn *const round_fns[HT_ISA_COUNT] = HT_ISA_ROW(ht_reduce_round_cpu);

static enum ht_status mpi_fail(struct ht_comm *c, int code, const char *what, int64_t seq)
{
    char text[MPI_MAX_ERROR_STRING] = "";
    int n = 0;

    MPI_Error_string(code, text, &n);
    c->failed = true;
    return HT_FAIL(HT_ERR_COMM, "rank %d of %d on %s: %s %" PRId64 ": MPI: %s", c->rank, c->size,
                   c->hosts ? c->hosts[c->rank] : "this host", what, seq, text);
}

#define MPI_TRY(c, what, seq, call)                                                                \
    do {                                                                                           \
        const int mpi_try_rc_ = (call);                                                            \
        if (mpi_try_rc_ != MPI_SUCCESS) return mpi_fail((c), mpi_try_rc_, (what), (seq));          \
    } while (0)

/* ---- start and end ---- */

static enum ht_status start(struct ht_comm *c, int *argc, char ***argv)
{
    int is_up = 0, is_down = 0, level = 0;
    char host[HOST_BYTES] = "";
    MPI_Comm local = MPI_COMM_NULL;

    MPI_Finalized(&is_down);
    if (is_down) return HT_FAIL(HT_ERR_COMM, "MPI was already shut down in this process");
    MPI_Initialized(&is_up);
    if (!is_up) {
        // An application without argv is allowed by MPI; errors here are fatal inside MPI itself.
        MPI_TRY(c, "MPI_Init", 0, MPI_Init_thread(argc, argv, MPI_THREAD_FUNNELED, &level));
        c->own_mpi = true;
    } else {
        MPI_TRY(c, "MPI_Query_thread", 0, MPI_Query_thread(&level));
    }
    if (level < MPI_THREAD_FUNNELED)
        return HT_FAIL(HT_ERR_UNSUPPORTED,
                       "this MPI gives thread level %d; %d (MPI_THREAD_FUNNELED) is needed", level,
                       MPI_THREAD_FUNNELED);
    MPI_TRY(c, "set-up", 0, MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN));
    MPI_TRY(c, "set-up", 0, MPI_Comm_dup(MPI_COMM_WORLD, &c->mpi));
    MPI_TRY(c, "set-up", 0, MPI_Comm_set_errhandler(c->mpi, MPI_ERRORS_RETURN));
    MPI_TRY(c, "set-up", 0, MPI_Comm_rank(c->mpi, &c->rank));
    MPI_TRY(c, "set-up", 0, MPI_Comm_size(c->mpi, &c->size));
    MPI_TRY(c, "set-up", 0,
            MPI_Comm_split_type(c->mpi, MPI_COMM_TYPE_SHARED, c->rank, MPI_INFO_NULL, &local));
    MPI_TRY(c, "set-up", 0, MPI_Comm_rank(local, &c->local_rank));
    MPI_TRY(c, "set-up", 0, MPI_Comm_size(local, &c->local_size));
    MPI_TRY(c, "set-up", 0, MPI_Comm_free(&local));

    c->hosts = calloc((size_t)c->size, HOST_BYTES);
    if (!c->hosts) return HT_FAIL(HT_ERR_MEMORY, "no memory for %d host names", c->size);
    if (gethostname(host, sizeof host - 1) != 0) strcpy(host, "unknown host");
    MPI_TRY(c, "set-up", 0,
            MPI_Allgather(host, HOST_BYTES, MPI_CHAR, c->hosts, HOST_BYTES, MPI_CHAR, c->mpi));
    return HT_OK;
}

enum ht_status ht_comm_init(struct ht_comm **out, int *argc, char ***argv)
{
    struct ht_comm *c = calloc(1, sizeof *c);

    *out = NULL;
    if (!c) return HT_FAIL(HT_ERR_MEMORY, "no memory for a communicator");
    c->mpi = MPI_COMM_NULL;
    c->window = MPI_WIN_NULL;
    c->size = c->local_size = 1;
    c->timeout_s = 300;
    c->sum = sum_fns[ht_isa_detect()];
    c->round = round_fns[ht_isa_detect()];
    const enum ht_status st = start(c, argc, argv);
    if (st != HT_OK) {
        ht_comm_finalize(c);
        return st;
    }
    *out = c;
    return HT_OK;
}

static void free_list(struct ht_comm_request *r)
{
    while (r) {
        struct ht_comm_request *next = r->next;
        free(r->mpi);
        free(r->to);
        free(r->src);
        free(r);
        r = next;
    }
}

void ht_comm_finalize(struct ht_comm *c)
{
    if (!c) return;
    ht_comm_device_free(c);
    // After a failure MPI_Finalize would wait for the lost peer for ever; with messages under way
    // it would write into buffers that their owners are about to free. The process ends soon in
    // both cases.
    if (!c->failed && !c->active) {
        if (c->mpi != MPI_COMM_NULL) MPI_Comm_free(&c->mpi);
        if (c->own_mpi) MPI_Finalize();
        free_list(c->free);
        free(c->small);
    }
    free(c->hosts);
    free(c);
}

int ht_comm_rank(const struct ht_comm *c)
{
    return c->rank;
}
int ht_comm_size(const struct ht_comm *c)
{
    return c->size;
}
int ht_comm_local_rank(const struct ht_comm *c)
{
    return c->local_rank;
}
int ht_comm_local_size(const struct ht_comm *c)
{
    return c->local_size;
}
void ht_comm_set_timeout(struct ht_comm *c, double seconds)
{
    c->timeout_s = seconds;
    ht_comm_device_set_timeout(c, seconds);
}

void ht_comm_abort(struct ht_comm *c, int exit_code, const char *message)
{
    if (!c) {
        fprintf(stderr, "%s\n", message);
    } else if (c->size == 1) {
        fprintf(stderr, "%s\n", message);
    } else {
        // one write: the lines of several ranks do not mix; errors of this file name the rank
        // already
        char who[HOST_BYTES + 64] = "";
        if (strncmp(message, "rank ", 5) != 0)
            snprintf(who, sizeof who, "rank %d of %d on %s: ", c->rank, c->size, c->hosts[c->rank]);
        fprintf(stderr, "%s%s (exit code %d)\n", who, message, exit_code);
    }
    fflush(NULL);
    if (c && c->size > 1) MPI_Abort(c->mpi, exit_code);
    _exit(exit_code);
}

/* ---- requests ---- */

/* A request from the pool with room for n messages. */
enum ht_status ht_comm_request_get(struct ht_comm *c, struct ht_comm_request **out,
                                   const char *what, int n)
{
    struct ht_comm_request *r = c->free;

    *out = NULL;
    HT_TRY(ht_comm_device_check(c));
    if (c->failed)
        return HT_FAIL(HT_ERR_COMM, "rank %d: %s refused: an earlier collective failed", c->rank,
                       what);
    if (r) {
        c->free = r->next;
    } else {
        r = calloc(1, sizeof *r);
        if (r) r->src = calloc((size_t)c->size, sizeof *r->src);
        if (!r || !r->src) {
            free(r);
            return HT_FAIL(HT_ERR_MEMORY, "no memory for a collective of %d ranks", c->size);
        }
    }
    if (r->capacity < n) {
        free(r->mpi);
        free(r->to);
        r->capacity = 0;
        r->mpi = calloc((size_t)n, sizeof(MPI_Request));
        r->to = calloc((size_t)n, sizeof(struct ht_comm_transfer));
        if (!r->mpi || !r->to) {
            r->next = c->free;
            c->free = r;
            return HT_FAIL(HT_ERR_MEMORY, "no memory for %d messages", n);
        }
        r->capacity = n;
    }
    r->what = what;
    r->seq = ++c->seq;
    if (c->own) __atomic_store_n(&c->own->seq, c->seq, __ATOMIC_RELEASE);
    r->op = NULL;
    r->n = 0;
    r->moved = false;
    r->out = NULL;
    // at the end of the list: the oldest is finished first
    struct ht_comm_request **at = &c->active;
    while (*at) at = &(*at)->next;
    *at = r;
    r->next = NULL;
    *out = r;
    return HT_OK;
}

void ht_comm_request_put(struct ht_comm *c, struct ht_comm_request *r)
{
    struct ht_comm_request **at = &c->active;

    while (*at != r) at = &(*at)->next;
    *at = r->next;
    r->next = c->free;
    c->free = r;
}

static int n_pieces(int64_t n_bytes)
{
    const int64_t n = (n_bytes + HT_COMM_MAX_MESSAGE - 1) / HT_COMM_MAX_MESSAGE;
    return n < 1 ? 1 : (int)n; // an empty message is a message: it says "I am here"
}

static enum ht_status post(struct ht_comm *c, struct ht_comm_request *r, bool is_recv, int peer,
                           void *data, int64_t n_bytes)
{
    const int tag = (int)(r->seq % TAGS);
    char *p = data;

    for (int i = n_pieces(n_bytes); i > 0; i--) {
        const int64_t m = n_bytes < HT_COMM_MAX_MESSAGE ? n_bytes : HT_COMM_MAX_MESSAGE;
        r->to[r->n] = (struct ht_comm_transfer){ peer, is_recv };
        r->mpi[r->n] = MPI_REQUEST_NULL;
        if (is_recv)
            MPI_TRY(c, r->what, r->seq,
                    MPI_Irecv(p, (int)m, MPI_BYTE, peer, tag, c->mpi, &r->mpi[r->n]));
        else
            MPI_TRY(c, r->what, r->seq,
                    MPI_Isend(p, (int)m, MPI_BYTE, peer, tag, c->mpi, &r->mpi[r->n]));
        r->n++;
        p += m;
        n_bytes -= m;
    }
    return HT_OK;
}

/* Exchange with every other rank k: recv + k * n_bytes from it, send + k * send_stride to it.
 * Neighbours differ at every moment, so that no rank is flooded by all others at once. */
static enum ht_status exchange(struct ht_comm *c, struct ht_comm_request *r, char *recv, char *send,
                               int64_t send_stride, int64_t n_bytes)
{
    for (int k = 1; k < c->size; k++) {
        const int from = (c->rank - k + c->size) % c->size;
        HT_TRY(post(c, r, true, from, recv + from * n_bytes, n_bytes));
    }
    for (int k = 1; k < c->size; k++) {
        const int to = (c->rank + k) % c->size;
        HT_TRY(post(c, r, false, to, send + to * send_stride, n_bytes));
    }
    return HT_OK;
}

/* The last step of a collective whose messages are through. */
static void complete(struct ht_comm *c, struct ht_comm_request *r)
{
    r->moved = true;
    if (r->out) c->sum(r->out, r->src, c->size, r->n_sum, r->wire);
    r->out = NULL;
}

static enum ht_status poll_request(struct ht_comm *c, struct ht_comm_request *r)
{
    int flag = 0;

    if (r->moved || r->op) return HT_OK;
    MPI_TRY(c, r->what, r->seq, MPI_Testall(r->n, r->mpi, &flag, MPI_STATUSES_IGNORE));
    if (flag) complete(c, r);
    return HT_OK;
}

/* Append the ranks whose messages of that direction are not through: "rank 3 on node17, ...". */
static bool list_missing(const struct ht_comm *c, struct ht_comm_request *r, bool is_recv,
                         char *text, size_t n_text)
{
    int n_found = 0;
    size_t at = 0;

    text[0] = '\0';
    for (int i = 0; i < r->n; i++) {
        if (r->to[i].is_recv != is_recv || r->mpi[i] == MPI_REQUEST_NULL) continue;
        if (i > 0 && r->to[i - 1].peer == r->to[i].peer && r->to[i - 1].is_recv == is_recv &&
            r->mpi[i - 1] != MPI_REQUEST_NULL)
            continue; // another piece of the same message
        if (++n_found > 8) continue;
        const int n = snprintf(text + at, n_text - at, "%srank %d on %s", at ? ", " : "",
                               r->to[i].peer, c->hosts[r->to[i].peer]);
        if (n > 0) at = at + (size_t)n < n_text ? at + (size_t)n : n_text - 1;
    }
    if (n_found > 8) snprintf(text + at, n_text - at, " and %d more", n_found - 8);
    return n_found > 0;
}

static enum ht_status timed_out(struct ht_comm *c, struct ht_comm_request *r)
{
    char from[1024], to[1024];

    // MPI_Testall leaves all requests alone until all are done: ask each
    for (int i = 0; i < r->n; i++) {
        int flag;
        MPI_Test(&r->mpi[i], &flag, MPI_STATUS_IGNORE);
    }
    const bool no_from = list_missing(c, r, true, from, sizeof from);
    const bool no_to = list_missing(c, r, false, to, sizeof to);
    c->failed = true;
    return HT_FAIL(HT_ERR_COMM,
                   "rank %d of %d on %s: %s %" PRId64 " timed out after %g s: %s%s%s%s%s", c->rank,
                   c->size, c->hosts[c->rank], r->what, r->seq, c->timeout_s,
                   no_from ? "nothing came from " : "", from, no_from && no_to ? "; " : "",
                   no_to ? "not taken by " : "", to);
}

/* Give the core away for a while that grows with the time already waited. A quarter of a
 * millisecond keeps fragments of a large message flowing; a wait of seconds is a slow peer, not a
 * transfer. */
static void pause_for(double waited_s)
{
    if (waited_s < 50e-6) {
        sched_yield();
        return;
    }
    double s = waited_s / 8;
    const double longest = waited_s < 1 ? 250e-6 : 2e-3;
    if (s > longest) s = longest;
    const struct timespec t = { 0, (long)(s * 1e9) };
    nanosleep(&t, NULL);
}

enum ht_status ht_comm_wait(struct ht_comm *c, struct ht_comm_request **req)
{
    struct ht_comm_request *r = *req;
    double last, waited = 0;

    if (!r) return HT_OK;
    *req = NULL;
    if (r->op) return ht_comm_device_wait(c, r);
    last = ht_time_s();
    for (;;) {
        HT_TRY(poll_request(c, r));
        if (r->moved) break;
        HT_TRY(ht_comm_device_check(c)); // whom we wait for may have had to give up
        if (waited > c->timeout_s) return timed_out(c, r);
        pause_for(waited);
        const double now = ht_time_s();
        // A process that was itself stopped for minutes must not blame the others at once.
        waited += now - last < 1 ? now - last : 1;
        last = now;
    }
    ht_comm_request_put(c, r);
    return HT_OK;
}

enum ht_status ht_comm_test(struct ht_comm *c, struct ht_comm_request **req, bool *done)
{
    *done = true;
    if (!*req) return HT_OK;
    HT_TRY(poll_request(c, *req));
    *done = (*req)->moved;
    if (*done) {
        ht_comm_request_put(c, *req);
        *req = NULL;
    }
    return HT_OK;
}

void ht_comm_progress(struct ht_comm *c)
{
    if (c->failed) return;
    for (struct ht_comm_request *r = c->active; r; r = r->next)
        if (poll_request(c, r) != HT_OK) return; // the wait reports it
}

/* ---- collectives ---- */

enum ht_status ht_comm_ibarrier_start(struct ht_comm *c, struct ht_comm_request **out_req)
{
    static char nothing;

    HT_TRY(ht_comm_request_get(c, out_req, "barrier", 2 * c->size));
    return exchange(c, *out_req, &nothing, &nothing, 0, 0);
}

enum ht_status ht_comm_barrier(struct ht_comm *c)
{
    struct ht_comm_request *r;

    HT_TRY(ht_comm_ibarrier_start(c, &r));
    return ht_comm_wait(c, &r);
}

enum ht_status ht_comm_broadcast(struct ht_comm *c, void *data, int64_t n_bytes, int root)
{
    struct ht_comm_request *r;
    char *p = data;

    if (root < 0 || root >= c->size || n_bytes < 0)
        return HT_FAIL(HT_ERR_ARG, "broadcast of %" PRId64 " bytes from rank %d of %d", n_bytes,
                       root, c->size);
    if (c->size == 1) return HT_OK;
    // A tree of messages cannot tell who is missing, a barrier can; broadcasts happen at start
    // only.
    HT_TRY(ht_comm_barrier(c));
    while (n_bytes > 0) {
        const int64_t m = n_bytes < HT_COMM_MAX_MESSAGE ? n_bytes : HT_COMM_MAX_MESSAGE;
        HT_TRY(ht_comm_request_get(c, &r, "broadcast", 1));
        r->to[0] = (struct ht_comm_transfer){ root, c->rank != root };
        MPI_TRY(c, r->what, r->seq, MPI_Ibcast(p, (int)m, MPI_BYTE, root, c->mpi, &r->mpi[0]));
        r->n = 1;
        HT_TRY(ht_comm_wait(c, &r));
        p += m;
        n_bytes -= m;
    }
    return HT_OK;
}

enum ht_status ht_comm_all_gather_start(struct ht_comm *c, struct ht_comm_request **out_req,
                                        void *data, int64_t n_bytes)
{
    *out_req = NULL;
    if (n_bytes < 0) return HT_FAIL(HT_ERR_ARG, "all-gather of %" PRId64 " bytes", n_bytes);
    if (c->device) return ht_comm_device_all_gather(c, out_req, data, n_bytes);
    HT_TRY(ht_comm_request_get(c, out_req, "all-gather", 2 * c->size * n_pieces(n_bytes)));
    return exchange(c, *out_req, data, (char *)data + c->rank * n_bytes, 0, n_bytes);
}

size_t ht_comm_staging_bytes(const struct ht_comm *c, int64_t n, enum ht_dtype wire)
{
    if (c->device) // NCCL adds in place; bf16: what goes out, and the sums
        return wire == HT_DTYPE_F32 ? 0 : ((size_t)c->size + 1) * (size_t)n * sizeof(ht_bf16);
    if (c->size == 1) return 0;
    // what comes in from each rank; with bf16 also what goes out
    const size_t in = (size_t)c->size * (size_t)n * ht_dtype_bytes(wire);
    return wire == HT_DTYPE_F32 ? in : 2 * in;
}

enum ht_status ht_comm_reduce_scatter_start(struct ht_comm *c, struct ht_comm_request **out_req,
                                            float *out, const float *in, int64_t n,
                                            enum ht_dtype wire, void *staging)
{
    struct ht_comm_request *r;

    *out_req = NULL;
    if (n < 0 || (wire != HT_DTYPE_F32 && wire != HT_DTYPE_BF16))
        return HT_FAIL(HT_ERR_ARG, "reduce-scatter of %" PRId64 " values in %s; fp32 or bf16", n,
                       ht_dtype_name(wire));
    if (c->device) return ht_comm_device_reduce_scatter(c, out_req, out, in, n, wire, staging);
    const int64_t n_bytes = n * (int64_t)ht_dtype_bytes(wire);
    HT_TRY(ht_comm_request_get(c, &r, "reduce-scatter", 2 * c->size * n_pieces(n_bytes)));
    *out_req = r;
    if (c->size == 1) { // nothing travels, so nothing is rounded either
        if (out != in && n > 0) memcpy(out, in, (size_t)n * sizeof(float));
        return HT_OK;
    }

    char *recv = staging;
    void *send = NULL; // MPI's send buffers are const in all but name
    if (wire == HT_DTYPE_BF16) {
        send = recv + c->size * n_bytes;
        c->round(send, in, c->size * n);
    } else {
        memcpy(&send, &in, sizeof send);
    }
    for (int k = 0; k < c->size; k++)
        r->src[k] = k == c->rank ? (const char *)send + k * n_bytes : recv + k * n_bytes;
    r->out = out;
    r->n_sum = n;
    r->wire = wire;
    return exchange(c, r, recv, send, n_bytes, n_bytes);
}

/* Everyone's n values of 8 bytes at c->small, in rank order. */
static enum ht_status gather_small(struct ht_comm *c, const void *x, int n, const char *what)
{
    struct ht_comm_request *r;
    const size_t n_bytes = (size_t)n * 8, all = n_bytes * (size_t)c->size;

    if (n < 0) return HT_FAIL(HT_ERR_ARG, "%s of %d values", what, n);
    if (c->small_bytes < all) {
        void *p = realloc(c->small, all);
        if (!p) return HT_FAIL(HT_ERR_MEMORY, "no memory for %zu bytes (%s)", all, what);
        c->small = p;
        c->small_bytes = all;
    }
    char *own = (char *)c->small + n_bytes * (size_t)c->rank;
    if (n > 0) memcpy(own, x, n_bytes);
    HT_TRY(ht_comm_request_get(c, &r, what, 2 * c->size * n_pieces((int64_t)n_bytes)));
    HT_TRY(exchange(c, r, c->small, own, 0, (int64_t)n_bytes));
    return ht_comm_wait(c, &r);
}

/* x[i] = combination over ranks k of v[k * n + i], in rank order */
#define COMBINE(name, type, label, expr)                                                           \
    enum ht_status name(struct ht_comm *c, type *x, int n)                                         \
    {                                                                                              \
        HT_TRY(gather_small(c, x, n, label));                                                      \
        const type *v = c->small;                                                                  \
        for (int i = 0; i < n; i++) {                                                              \
            type a = v[i];                                                                         \
            for (int k = 1; k < c->size; k++) {                                                    \
                const type b = v[(int64_t)k * n + i];                                              \
                a = (expr);                                                                        \
            }                                                                                      \
            x[i] = a;                                                                              \
        }                                                                                          \
        return HT_OK;                                                                              \
    }

COMBINE(ht_comm_sum_f64, double, "sum", a + b)
// a NaN of any rank wins: every rank must see it
COMBINE(ht_comm_max_f64, double, "maximum", isnan(a) || a > b ? a : b)
COMBINE(ht_comm_min_i64, int64_t, "minimum", a < b ? a : b)
COMBINE(ht_comm_max_i64, int64_t, "maximum", a > b ? a : b)
