/* tests/ssm/scan_case.c: see scan_case.h.
 *
 * The bf16 tolerance: the reference is run again with every operand of a product and every result
 * rounded to bf16 once, sums exact (ssm_ref.h, round16): what plain 16-bit code loses on this data.
 * Ours may lose twice that, in root mean square and at the worst element.
 */
#include "tests/ssm/scan_case.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/rng.h"

enum { PAD = 8 };

static double *doubles(int64_t n)
{
    double *p = calloc((size_t)n + 1, sizeof *p);
    ck_assert_ptr_nonnull(p);
    return p;
}

static void set(struct tensor *t, int64_t i, double v)
{
    ht_store_f32(t->p, i, t->dtype, (float)v);
    t->d[i] = tensor_at(t, i);
}

static double draw(uint64_t seed, int64_t i)
{
    return (double)ht_rng_uniform(seed, 9, (uint64_t)i);
}

/* Columns col..col+n-1 of rows that are `width` wide, dense. */
static double *columns(const struct tensor *t, int64_t T, int64_t width, int64_t col, int64_t n)
{
    double *p = doubles(T * n);
    for (int64_t i = 0; i < T; i++)
        memcpy(p + i * n, t->d + i * width + col, (size_t)n * sizeof *p);
    return p;
}

static void fill_time_steps(struct scan_case *k, enum scan_data data, uint64_t seed)
{
    const int64_t H = k->shape.H;

    for (int64_t h = 0; h < H; h++) {
        const double rate = draw(seed + 1, h);
        set(&k->A_log, h,
            data == SCAN_REMEMBERS ? -5.0 * rate - 2.0 : log(0.05 + 16.0 * rate * rate));
        set(&k->dt_bias, h, 3.0 * draw(seed + 2, h) - 4.0);
        set(&k->D, h, 2.0 * draw(seed + 3, h) - 0.5);
    }
    for (int64_t t = 0; t < k->T && data == SCAN_EXTREME; t++)
        for (int64_t h = 0; h < H; h++) {
            const double u = draw(seed + 4, t * H + h);
            if (u < 0.05)
                set(&k->dt_raw, t * (H + PAD) + h, 1e4);
            else if (u < 0.15)
                set(&k->dt_raw, t * (H + PAD) + h, -60.0);
        }
}

static size_t elem(const struct scan_case *k)
{
    return ht_dtype_bytes(k->rows.dtype);
}

static void bind_args(struct scan_case *k, enum scan_data data)
{
    const struct scan_shape *s = &k->shape;
    const size_t B_at = (size_t)(s->H * s->P) * elem(k);
    const size_t C_at = B_at + (size_t)(s->G * s->N) * elem(k);
    const bool states = data != SCAN_PLAIN && data != SCAN_REMEMBERS;

    k->args = (struct ht_ssd_args){
        .seqs = { .n_seqs = k->ref.n_seqs,
                  .starts = NULL }, // set before each call: k may have moved
        .n_tokens = k->T,
        .n_heads = s->H,
        .d_head = s->P,
        .d_state = s->N,
        .n_groups = s->G,
        .chunk = s->Q,
        .dtype = k->rows.dtype,
        .dt_min = data == SCAN_CLAMPED ? 0.05f : 0.0f,
        .dt_max = data == SCAN_CLAMPED ? 0.3f : INFINITY,
        .x = k->rows.p,
        .B = (char *)k->rows.p + B_at,
        .C = (char *)k->rows.p + C_at,
        .x_stride = k->width,
        .dt_raw = k->dt_raw.p,
        .dt_stride = s->H + PAD,
        .dt_bias = k->dt_bias.p,
        .A_log = k->A_log.p,
        .D = k->D.p,
        .y = k->y.p,
        .y_stride = s->H * s->P + PAD,
        .init_state = states ? k->init.p : NULL,
        .final_state = k->final.p,
        .grad_y = k->grad_y.p,
        .grad_y_stride = s->H * s->P + PAD,
        .grad_x = k->grad_rows.p,
        .grad_B = (char *)k->grad_rows.p + B_at,
        .grad_C = (char *)k->grad_rows.p + C_at,
        .grad_x_stride = k->width,
        .grad_dt_raw = k->grad_dt_raw.p,
        .grad_dt_stride = s->H + PAD,
        .grad_dt_bias = k->grad_dt_bias.p,
        .grad_A_log = k->grad_A_log.p,
        .grad_D = k->grad_D.p,
        .grad_final_state = states ? k->grad_final.p : NULL,
        .grad_init_state = k->grad_init.p,
    };
}

static void bind_reference(struct scan_case *k)
{
    const struct scan_shape *s = &k->shape;
    const int64_t T = k->T, HP = s->H * s->P, GN = s->G * s->N;
    const int64_t states = k->ref.n_seqs * HP * s->N;
    struct ssm_ref_scan *r = &k->ref;

    r->T = T;
    r->H = s->H;
    r->P = s->P;
    r->N = s->N;
    r->G = s->G;
    r->dt_min = (double)k->args.dt_min;
    r->dt_max = (double)k->args.dt_max;
    r->x = columns(&k->rows, T, k->width, 0, HP);
    r->B = columns(&k->rows, T, k->width, HP, GN);
    r->C = columns(&k->rows, T, k->width, HP + GN, GN);
    r->dt_raw = columns(&k->dt_raw, T, s->H + PAD, 0, s->H);
    r->dt_bias = k->dt_bias.d;
    r->A_log = k->A_log.d;
    r->D = k->D.d;
    r->init = k->args.init_state ? k->init.d : NULL;
    r->y = doubles(T * HP);
    r->final = doubles(states);
    r->grad_y = columns(&k->grad_y, T, HP + PAD, 0, HP);
    r->grad_final = k->args.grad_final_state ? k->grad_final.d : NULL;
    r->grad_x = doubles(T * HP);
    r->grad_B = doubles(T * GN);
    r->grad_C = doubles(T * GN);
    r->grad_dt_raw = doubles(T * s->H);
    r->grad_dt_bias = doubles(s->H);
    r->grad_A_log = doubles(s->H);
    r->grad_D = doubles(s->H);
    r->grad_init = doubles(states);
}

struct scan_case scan_case_make(const struct scan_shape *shape, enum scan_data data,
                                enum ht_dtype dtype, uint64_t seed)
{
    struct scan_case k = { .shape = *shape };
    const int64_t H = shape->H, HP = H * shape->P;

    for (int s = 0; s < SCAN_MAX_SEQS && shape->lengths[s] > 0; s++) {
        k.starts[s + 1] = k.starts[s] + (int32_t)shape->lengths[s];
        k.ref.n_seqs = s + 1;
        k.T = k.starts[s + 1];
    }
    const int64_t states = k.ref.n_seqs * HP * shape->N;
    k.width = HP + 2 * shape->G * shape->N + PAD;
    k.rows = tensor_normal(k.T * k.width, dtype, 0.7, seed + 10);
    k.dt_raw = tensor_normal(k.T * (H + PAD), dtype, 1.0, seed + 11);
    k.dt_bias = tensor_make(H, HT_DTYPE_F32);
    k.A_log = tensor_make(H, HT_DTYPE_F32);
    k.D = tensor_make(H, HT_DTYPE_F32);
    k.init = tensor_normal(states, HT_DTYPE_F32, 0.5, seed + 12);
    k.grad_y = tensor_normal(k.T * (HP + PAD), dtype, 1.0, seed + 13);
    k.grad_final = tensor_normal(states, HT_DTYPE_F32, 0.3, seed + 14);
    fill_time_steps(&k, data, seed);
    k.y = tensor_make(k.T * (HP + PAD), dtype);
    k.final = tensor_make(states, HT_DTYPE_F32);
    k.grad_rows = tensor_make(k.T * k.width, dtype);
    k.grad_dt_raw = tensor_make(k.T * (H + PAD), dtype);
    k.grad_dt_bias = tensor_make(H, HT_DTYPE_F32);
    k.grad_A_log = tensor_make(H, HT_DTYPE_F32);
    k.grad_D = tensor_make(H, HT_DTYPE_F32);
    k.grad_init = tensor_make(states, HT_DTYPE_F32);
    bind_args(&k, data);
    bind_reference(&k);
    return k;
}

void scan_case_free(struct scan_case *k)
{
    struct tensor *all[] = { &k->rows,   &k->dt_raw,    &k->dt_bias,    &k->A_log,
                             &k->D,      &k->init,      &k->grad_y,     &k->grad_final,
                             &k->y,      &k->final,     &k->grad_rows,  &k->grad_dt_raw,
                             &k->grad_D, &k->grad_init, &k->grad_A_log, &k->grad_dt_bias };
    const struct ssm_ref_scan *r = &k->ref;
    const double *own[] = {
        r->x,      r->B,           r->C,          r->dt_raw,       r->y,
        r->final,  r->grad_y,      r->grad_x,     r->grad_B,       r->grad_C,
        r->grad_D, r->grad_dt_raw, r->grad_A_log, r->grad_dt_bias, r->grad_init
    };

    for (size_t i = 0; i < sizeof all / sizeof *all; i++) tensor_free(all[i]);
    for (size_t i = 0; i < sizeof own / sizeof *own; i++) free((void *)(uintptr_t)own[i]);
}

void scan_case_reference(struct scan_case *k)
{
    k->ref.starts = k->starts;
    ssm_ref_scan_forward(&k->ref);
    memset(k->ref.grad_dt_bias, 0, (size_t)k->ref.H * sizeof(double));
    memset(k->ref.grad_A_log, 0, (size_t)k->ref.H * sizeof(double));
    memset(k->ref.grad_D, 0, (size_t)k->ref.H * sizeof(double));
    ssm_ref_scan_backward(&k->ref);
}

static struct ht_backend backend_with(enum ht_isa isa, int n_threads, size_t bytes)
{
    struct ht_backend be = backend_make(isa, n_threads, bytes);
    ck_assert_uint_ge(be.scratch.size_bytes, bytes);
    return be;
}

void scan_case_forward(struct scan_case *k, enum ht_isa isa, int n_threads)
{
    // the threads are set first: the need follows them
    struct ht_backend be = backend_make(isa, n_threads, 64);

    k->args.seqs.starts = k->starts;
    ck_assert_int_eq(ht_backend_reserve_scratch(&be, ht_ssd_forward_scratch_bytes(&k->args)),
                     HT_OK);
    ck_assert_msg(ht_ssd_forward(&be, &k->args) == HT_OK, "%s", ht_error_message());
    ck_assert_uint_eq(be.scratch.used_bytes, 0);
    ht_backend_free(&be);
}

void scan_case_backward(struct scan_case *k, enum ht_isa isa, int n_threads)
{
    struct ht_backend be = backend_with(isa, n_threads, 64);

    k->args.seqs.starts = k->starts;
    tensor_fill(&k->grad_dt_bias, 0.0);
    tensor_fill(&k->grad_A_log, 0.0);
    tensor_fill(&k->grad_D, 0.0);
    ck_assert_int_eq(ht_backend_reserve_scratch(&be, ht_ssd_backward_scratch_bytes(&k->args)),
                     HT_OK);
    ck_assert_msg(ht_ssd_backward(&be, &k->args) == HT_OK, "%s", ht_error_message());
    ck_assert_uint_eq(be.scratch.used_bytes, 0);
    ht_backend_free(&be);
}

/* Root mean square and largest |got - want|, for rows of n elements. */
struct loss {
    double rms, worst, largest; // largest |want|
};

static void add_loss(struct loss *l, double got, double want, int64_t n)
{
    const double e = fabs(got - want);
    l->rms += e * e / (double)n;
    if (!(e <= l->worst)) l->worst = e; // NaN sticks
    l->largest = fmax(l->largest, fabs(want));
}

static void check_rows(const struct tensor *t, int64_t T, int64_t stride, int64_t col, int64_t n,
                       const double *want, const double *plain16, bool half, const char *what)
{
    struct loss ours = { 0 }, plain = { 0 };

    for (int64_t i = 0; i < T; i++)
        for (int64_t j = 0; j < n; j++) {
            const double w = want[i * n + j];
            add_loss(&ours, tensor_at(t, i * stride + col + j), w, T * n);
            add_loss(&plain, half ? plain16[i * n + j] : w, w, T * n);
        }
    const double slack = 1e-5 * (ours.largest + 1e-3);
    ck_assert_msg(sqrt(ours.rms) <= slack + 2.0 * sqrt(plain.rms),
                  "%s: rms error %.3g, largest value %.3g; plain 16-bit code loses %.3g", what,
                  sqrt(ours.rms), ours.largest, sqrt(plain.rms));
    ck_assert_msg(ours.worst <= slack + 4.0 * plain.worst,
                  "%s: worst error %.3g, largest value %.3g; plain 16-bit code loses %.3g", what,
                  ours.worst, ours.largest, plain.worst);
}

/* The reference with 16-bit losses, in results of its own. */
static struct ssm_ref_scan plain16_of(const struct scan_case *k)
{
    struct ssm_ref_scan r = k->ref;
    const int64_t T = r.T, states = r.n_seqs * r.H * r.P * r.N;

    r.round16 = true;
    r.starts = k->starts;
    r.y = doubles(T * r.H * r.P);
    r.final = doubles(states);
    r.grad_x = doubles(T * r.H * r.P);
    r.grad_B = doubles(T * r.G * r.N);
    r.grad_C = doubles(T * r.G * r.N);
    r.grad_dt_raw = doubles(T * r.H);
    r.grad_dt_bias = doubles(r.H);
    r.grad_A_log = doubles(r.H);
    r.grad_D = doubles(r.H);
    r.grad_init = doubles(states);
    if (k->rows.dtype == HT_DTYPE_BF16) {
        ssm_ref_scan_forward(&r);
        ssm_ref_scan_backward(&r);
    }
    return r;
}

static void plain16_free(struct ssm_ref_scan *r)
{
    double *own[] = { r->y,           r->final,        r->grad_x,     r->grad_B, r->grad_C,
                      r->grad_dt_raw, r->grad_dt_bias, r->grad_A_log, r->grad_D, r->grad_init };
    for (size_t i = 0; i < sizeof own / sizeof *own; i++) free(own[i]);
}

void scan_case_check_forward(const struct scan_case *k)
{
    const int64_t HP = k->shape.H * k->shape.P, states = k->ref.n_seqs * k->shape.H;
    const bool half = k->rows.dtype == HT_DTYPE_BF16;
    struct ssm_ref_scan p = plain16_of(k);

    check_rows(&k->y, k->T, HP + PAD, 0, HP, k->ref.y, p.y, half, "y");
    check_rows(&k->final, states, k->shape.P * k->shape.N, 0, k->shape.P * k->shape.N, k->ref.final,
               p.final, half, "final_state");
    plain16_free(&p);
}

static void check_gradients(const struct scan_case *k, bool sums)
{
    const int64_t H = k->shape.H, HP = H * k->shape.P, GN = k->shape.G * k->shape.N;
    const int64_t PN = k->shape.P * k->shape.N;
    const bool half = k->rows.dtype == HT_DTYPE_BF16;
    struct ssm_ref_scan p = plain16_of(k);
    const struct ssm_ref_scan *r = &k->ref;

    check_rows(&k->grad_rows, k->T, k->width, 0, HP, r->grad_x, p.grad_x, half, "grad_x");
    check_rows(&k->grad_rows, k->T, k->width, HP, GN, r->grad_B, p.grad_B, half, "grad_B");
    check_rows(&k->grad_rows, k->T, k->width, HP + GN, GN, r->grad_C, p.grad_C, half, "grad_C");
    check_rows(&k->grad_dt_raw, k->T, H + PAD, 0, H, r->grad_dt_raw, p.grad_dt_raw, half,
               "grad_dt_raw");
    check_rows(&k->grad_init, r->n_seqs * H, PN, 0, PN, r->grad_init, p.grad_init, half,
               "grad_init_state");
    if (sums) {
        check_rows(&k->grad_dt_bias, 1, H, 0, H, r->grad_dt_bias, p.grad_dt_bias, half,
                   "grad_dt_bias");
        check_rows(&k->grad_A_log, 1, H, 0, H, r->grad_A_log, p.grad_A_log, half, "grad_A_log");
        check_rows(&k->grad_D, 1, H, 0, H, r->grad_D, p.grad_D, half, "grad_D");
    }
    plain16_free(&p);
}

void scan_case_check_backward(const struct scan_case *k)
{
    check_gradients(k, true);
}

/* Square of what plain 16-bit code loses on average in the sums over tokens, over heads and several
 * draws of data. */
static void plain16_of_sums(double (*loss)[3], const struct scan_case *k, enum scan_data data)
{
    enum { DRAWS = 8 };
    const int64_t H = k->shape.H;

    memset(loss, 0, sizeof *loss);
    for (uint64_t seed = 0; seed < DRAWS; seed++) {
        struct scan_case c = scan_case_make(&k->shape, data, k->rows.dtype, 100 + seed);
        scan_case_reference(&c);
        struct ssm_ref_scan p = plain16_of(&c);
        for (int64_t h = 0; h < H; h++) {
            const double e[3] = { p.grad_dt_bias[h] - c.ref.grad_dt_bias[h],
                                  p.grad_A_log[h] - c.ref.grad_A_log[h],
                                  p.grad_D[h] - c.ref.grad_D[h] };
            for (int i = 0; i < 3; i++) (*loss)[i] += e[i] * e[i] / (double)(DRAWS * H);
        }
        plain16_free(&p);
        scan_case_free(&c);
    }
}

void scan_case_check_backward_of(const struct scan_case *k, enum scan_data data)
{
    const struct tensor *ours[3] = { &k->grad_dt_bias, &k->grad_A_log, &k->grad_D };
    const double *want[3] = { k->ref.grad_dt_bias, k->ref.grad_A_log, k->ref.grad_D };
    static const char *const names[3] = { "grad_dt_bias", "grad_A_log", "grad_D" };
    double loss[3];

    if (k->rows.dtype != HT_DTYPE_BF16) {
        check_gradients(k, true);
        return;
    }
    check_gradients(k, false);
    plain16_of_sums(&loss, k, data);
    for (int i = 0; i < 3; i++) {
        const double slack = 1e-5 * (max_abs(want[i], k->shape.H) + 1e-3);
        for (int64_t h = 0; h < k->shape.H; h++)
            ck_assert_msg(fabs(tensor_at(ours[i], h) - want[i][h]) <= slack + 4.0 * sqrt(loss[i]),
                          "%s[%lld]: error %.3g; plain 16-bit code loses %.3g", names[i],
                          (long long)h, fabs(tensor_at(ours[i], h) - want[i][h]), sqrt(loss[i]));
    }
}

void scan_case_same_bits(const struct scan_case *a, const struct scan_case *b)
{
    check_same_bits(&a->y, &b->y, "y");
    check_same_bits(&a->final, &b->final, "final_state");
    check_same_bits(&a->grad_rows, &b->grad_rows, "grad_x, grad_B or grad_C");
    check_same_bits(&a->grad_dt_raw, &b->grad_dt_raw, "grad_dt_raw");
    check_same_bits(&a->grad_dt_bias, &b->grad_dt_bias, "grad_dt_bias");
    check_same_bits(&a->grad_A_log, &b->grad_A_log, "grad_A_log");
    check_same_bits(&a->grad_D, &b->grad_D, "grad_D");
    check_same_bits(&a->grad_init, &b->grad_init, "grad_init_state");
}

static void close_tensors(const struct tensor *a, const struct tensor *b, const char *what)
{
    double largest = 0.0;

    // bytes never written are equal in both and far from any value: leave them out
    for (int64_t i = 0; i < b->n; i++)
        if (fabs(tensor_at(b, i)) > 1e-12) largest = fmax(largest, fabs(tensor_at(b, i)));
    for (int64_t i = 0; i < b->n; i++)
        ck_assert_msg(fabs(tensor_at(a, i) - tensor_at(b, i)) <= 1e-5 * largest,
                      "%s[%lld]: %.9g and %.9g, largest %.3g", what, (long long)i, tensor_at(a, i),
                      tensor_at(b, i), largest);
}

void scan_case_close(const struct scan_case *a, const struct scan_case *b)
{
    close_tensors(&a->y, &b->y, "y");
    close_tensors(&a->final, &b->final, "final_state");
    close_tensors(&a->grad_rows, &b->grad_rows, "grad_x, grad_B or grad_C");
    close_tensors(&a->grad_dt_raw, &b->grad_dt_raw, "grad_dt_raw");
    close_tensors(&a->grad_dt_bias, &b->grad_dt_bias, "grad_dt_bias");
    close_tensors(&a->grad_A_log, &b->grad_A_log, "grad_A_log");
    close_tensors(&a->grad_D, &b->grad_D, "grad_D");
    close_tensors(&a->grad_init, &b->grad_init, "grad_init_state");
}
