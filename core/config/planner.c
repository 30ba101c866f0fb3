/* core/config/planner.c: FLOPs (spec 7), bytes per rank, predicted step time, and whether it fits.
 */
#include "core/config/planner.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/base/isa.h"
#include "core/config/linears.h"

/* ---- devices ---- */

enum { GPUS_PER_HOST = 8 };

/* Sustained inside a whole training step, not peaks; none of these was measured by this project
 * (docs/gpu-status.md has what was).
 *
 *   bf16      H100: products at 650 TF/s, as published steps reach, and an eighth of the time for
 *             scan, norms and loss: 570. H200: the same processor. A100: 271 in products alone, 217
 * in a step. fp32 without tensor cores: 75 % of the peak. links     within a host of 8: what NCCL's
 * rings reach over NVLink. Between hosts: eight 400 Gb/s adapters on H100 and H200, at half of
 * their rate (reported for 256 H100), 200 Gb/s on A100. NCCL's way of counting: bytes gathered /
 * time. fp8 in the projections: 1.3 times bf16, the low end of what published steps gain. */
static const struct gpu {
    const char *name;
    double bf16, peak_bf16, fp8, peak_fp8, fp32, peak_fp32, memory_bytes_s, memory_bytes;
    double host_link_bytes_s, network_bytes_s;
} gpus[] = {
    { "h100", 570e12, 989e12, 740e12, 1979e12, 50e12, 67e12, 2.6e12, 80e9, 360e9, 200e9 },
    { "h200", 570e12, 989e12, 740e12, 1979e12, 50e12, 67e12, 3.7e12, 141e9, 360e9, 200e9 },
    { "a100", 217e12, 312e12, 0, 0, 14.6e12, 19.5e12, 1.6e12, 80e9, 240e9, 100e9 },
};

/* Multiprocessors that a collective keeps from the kernels beside it: 16 of 132. */
static const double collective_share = 0.12;

/* What selective recomputation adds to a pass: norms, convolution, SwiGLU. */
static const double selective_share = 0.012;

/* One core of a 2-core AMD Zen 5 virtual machine, by CPU level: what forward and backward sustain,
 * and the core's peak.
 *
 * bf16 with bf16 instructions is measured on whole steps on both cores with nothing beside them
 * (bench/results/cpu-zen5-2core: 729 to 836 GFLOP/s of 130 M and 217 M parameters, optimiser
 * included; 746 to 856 without it, half of their middle here). The other cells are estimates:
 * processor time of one thread of bench_train_step (53 M parameters, rows of 512 tokens, optimiser
 * included, other programs beside it) with HT_CPU_ISA and ONEDNN_MAX_CPU_ISA at that level; the
 * same run gave 294 where the whole machine gave 400. Another processor differs by its clock and by
 * its vector units. */
static const struct {
    double fp32, bf16, peak_fp32, peak_bf16;
} core_flops[HT_ISA_COUNT] = {
    [HT_ISA_PLAIN] = { 40e9, 37e9, 61e9, 61e9 },
    [HT_ISA_AVX2] = { 115e9, 75e9, 125e9, 125e9 },
    [HT_ISA_AVX512] = { 190e9, 190e9, 250e9, 250e9 },
    [HT_ISA_AVX512BF16] = { 190e9, 400e9, 250e9, 500e9 },
};

/* Said beside the prediction. */
static const char *cpu_basis(enum ht_isa isa, bool bf16)
{
    return isa == HT_ISA_AVX512BF16 && bf16
               ? "measured training steps on AMD Zen 5 cores; others differ by clock and vector "
                 "units"
               : "estimated from single runs at this level on an AMD Zen 5 core, not measured on a "
                 "processor of this level";
}

static const double cpu_memory_bytes_s = 40e9; // read test of that machine, all cores together
static const double cpu_link_bytes_s = 4e9;    // assumed: ranks of one host, through shared memory

/* What a process takes beside the plan: code, libraries, generated products. Measured on one and
 * two ranks of quickstart and debug_tiny: peak resident memory less the other parts of the plan, 38
 * to 45 MiB. */
static const int64_t cpu_program_bytes = INT64_C(40) << 20;
static const int64_t gpu_program_bytes = INT64_C(2)
                                         << 30; // context, cuBLAS workspace, NCCL buffers

/* Memory that this process may use: the machine's, or the control group's limit. */
static double machine_memory_bytes(void)
{
    const double machine = (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE);
    double limit = 0.0;
    FILE *f = fopen("/sys/fs/cgroup/memory.max", "r");

    if (f) {
        if (fscanf(f, "%lf", &limit) != 1) limit = 0.0; // "max"
        fclose(f);
    }
    return limit > 0.0 && limit < machine ? limit : machine;
}

/* One of n_ranks ranks that share this machine. */
static struct ht_device_model cpu_model(const struct ht_config *c, int n_ranks)
{
    const bool bf16 = c->train.precision == HT_DTYPE_BF16;
    const long cores = sysconf(_SC_NPROCESSORS_ONLN);
    const double share = (double)(cores > 0 ? cores : 1) / n_ranks;
    const double threads =
        c->train.threads > 0 && c->train.threads < share ? c->train.threads : share;
    const enum ht_isa isa = ht_isa_detect();

    return (struct ht_device_model){
        .name = "cpu",
        .level = ht_isa_name(isa),
        .basis = cpu_basis(isa, bf16),
        .matmul_flops = threads * (bf16 ? core_flops[isa].bf16 : core_flops[isa].fp32),
        .memory_bytes_s = cpu_memory_bytes_s / n_ranks,
        .link_bytes_s = cpu_link_bytes_s / n_ranks,
        .memory_bytes = machine_memory_bytes() / n_ranks,
        .peak_flops = threads * (bf16 ? core_flops[isa].peak_bf16 : core_flops[isa].peak_fp32),
    };
}

static bool find_gpu(struct ht_device_model *out, const char *name, const struct ht_config *c,
                     int n_ranks)
{
    const bool bf16 = c->train.precision == HT_DTYPE_BF16;
    const bool fp8 = c->train.linear_dtype == HT_LINEAR_FP8;

    for (const struct gpu *g = gpus; g < gpus + sizeof gpus / sizeof *gpus; g++) {
        if (strcmp(g->name, name)) continue;
        *out = (struct ht_device_model){
            .name = g->name,
            .level = "",
            .basis = "estimated from published figures, not measured by this project",
            .matmul_flops = fp8    ? g->fp8
                            : bf16 ? g->bf16
                                   : g->fp32,
            .memory_bytes_s = g->memory_bytes_s,
            .link_bytes_s = n_ranks > GPUS_PER_HOST ? g->network_bytes_s : g->host_link_bytes_s,
            .memory_bytes = g->memory_bytes,
            .peak_flops = fp8    ? g->peak_fp8
                          : bf16 ? g->peak_bf16
                                 : g->peak_fp32,
        };
        return true;
    }
    return false;
}

/* ---- FLOPs ---- */

double ht_flops_forward(const struct ht_model_config *m, double seq)
{
    const double h = (double)m->d_model, inner = (double)m->d_inner, H = (double)m->ssm_heads;
    const double P = (double)m->ssm_d_head, N = (double)m->d_state, G = (double)m->n_groups;
    const double Q = (double)m->chunk, heads = (double)(m->n_heads * m->d_head);
    double flops = 2.0 * h * (double)m->vocab_size; // head; an embedding look-up costs nothing

    for (int64_t i = 0; i < m->n_layers; i++) {
        if (m->layer_kind[i] == HT_LAYER_MAMBA) {
            flops += 2.0 * h * (double)ht_in_proj_width(m) + 2.0 * inner * h;
            flops += 2.0 * (double)m->d_conv * (double)ht_conv_channels(m);
            flops += 4.0 * H * P * N + (Q + 1.0) * (G * N + H * P) + 2.0 * H * P * N / Q;
        } else {
            flops += 2.0 * h * (double)ht_qkv_width(m) + 2.0 * heads * h;
            flops += 2.0 * seq * heads;
        }
        flops += 6.0 * h * (double)m->d_ff;
    }
    return flops;
}

/* ---- bytes ---- */

static int64_t part(int64_t n, int64_t n_ranks)
{
    return (n + n_ranks - 1) / n_ranks;
}

/* Elements of the places of units (distributed/zero_units.c): two of the largest; where the first
 * is used throughout, a third of its own. */
static int64_t unit_places(const struct ht_tensor_list *l, bool keep_first, int64_t n_ranks)
{
    const int64_t a = 64 * n_ranks;
    int64_t most = 0;

    for (int i = keep_first; i < l->n_units; i++)
        if (l->unit_start[i + 1] - l->unit_start[i] > most)
            most = l->unit_start[i + 1] - l->unit_start[i];
    return 2 * (part(most, a) * a) + (keep_first ? part(l->unit_start[1], a) * a : 0);
}

/* Messages of reductions: four at a time (distributed/zero.c), the padded copies of two buckets,
 * and what MPI holds of a message. NCCL works in place; bf16 needs what is sent and received. */
static int64_t message_bytes(const struct ht_config *c, const struct ht_tensor_list *l, int64_t n,
                             bool gpu)
{
    const int64_t all = 4 * l->n_total;
    const int64_t bucket = c->parallel.bucket_bytes < all ? c->parallel.bucket_bytes : all;
    const int64_t four = 4 * bucket < all ? 4 * bucket : all;
    int64_t bytes = 0;

    if (n > 1) bytes += 2 * bucket;
    if (n > 1 && !gpu) bytes += four;
    if (gpu && c->parallel.wire == HT_DTYPE_BF16) bytes += four / 2 + part(four / 2, n);
    if (c->parallel.zero_stage >= 2) bytes += part(four, n);
    return bytes;
}

static void plan_bytes(struct ht_plan *p, const struct ht_config *c, const struct ht_tensor_list *l,
                       bool gpu)
{
    struct ht_plan_bytes *b = &p->bytes;
    const int64_t n = p->n_ranks;
    const int stage = c->parallel.zero_stage;
    const int64_t width = (int64_t)ht_dtype_bytes(c->train.precision);
    const int64_t n_vector = l->n_total - l->n_matrix;
    const int64_t shard = stage >= 1 ? part(l->n_total, n) : l->n_total;
    const int64_t places = unit_places(l, c->model.tied_head, n);
    const int64_t tokens = c->train.micro_batch * c->data.seq_len;

    b->weights = l->n_matrix * width + n_vector * 4;
    if (stage >= 3) b->weights = (part(l->n_matrix, n) + places) * width + n_vector * 4;
    if (c->train.linear_dtype == HT_LINEAR_FP8)
        b->weights += ht_fp8_sizes(&c->model, tokens, stage < 3).total;
    b->gradients = l->n_total * 4; // summed in fp32 on every backend
    if (stage >= 2) b->gradients = (shard + places + n_vector) * 4;
    b->optimizer = 12 * shard; // master weights and two moments
    b->buffers = message_bytes(c, l, n, gpu);
    if (n > 1 && stage == 1) b->buffers += 4 * shard; // this rank's sums
    if (c->checkpoint.background && !gpu)
        b->buffers += 12 * shard;                               // a GPU's is in the host's memory
    b->buffers += (1 + c->data.prefetch_batches) * tokens * 12; // ids, labels, positions
    if (c->data.shuffle) // starts of the rows of two windows (data/rows.h)
        b->buffers += 2 * c->data.shuffle_window_rows * (28 + 16 * (int64_t)c->data.n_train);
    b->program = gpu ? gpu_program_bytes : cpu_program_bytes;
    b->total = b->weights + b->gradients + b->optimizer + b->activations + b->scratch + b->buffers +
               b->program;
}

/* ---- time ---- */

/* Seconds of one pass of one rank, and of the collectives that go on beside it. */
struct pass_time {
    double compute_s, beside_s; // beside_s: under way during the pass
};

static struct pass_time pass_time(const struct ht_plan *p, const struct ht_config *c,
                                  double gather_s, double reduce_s)
{
    const double per_pass = (double)(c->train.micro_batch * c->data.seq_len);
    const int stage = c->parallel.zero_stage;
    double flops = p->flops_train;

    if (c->train.recompute == HT_RECOMPUTE_FULL) flops += p->flops_forward; // forward passes twice
    if (c->train.recompute == HT_RECOMPUTE_SELECTIVE) flops *= 1.0 + selective_share;
    return (struct pass_time){
        .compute_s = per_pass * flops / p->device.matmul_flops,
        .beside_s = (stage >= 2 ? reduce_s : 0.0) + (stage >= 3 ? 2.0 * gather_s : 0.0),
    };
}

static void plan_time(struct ht_plan *p, const struct ht_config *c, const struct ht_tensor_list *l,
                      bool gpu)
{
    const struct ht_device_model *d = &p->device;
    const int stage = c->parallel.zero_stage;
    const double n = (double)p->n_ranks, moved = (n - 1.0) / n;
    const double width = (double)ht_dtype_bytes(c->train.precision);
    const double wire = (double)ht_dtype_bytes(c->parallel.wire), n_total = (double)l->n_total;
    const double gather_s = n_total * width * moved / d->link_bytes_s;
    const double reduce_s = n_total * wire * moved / d->link_bytes_s;
    const struct pass_time t = pass_time(p, c, gather_s, reduce_s);
    const double first = (double)(l->unit_start[1] - l->unit_start[0]) * moved / d->link_bytes_s;
    const double passes = (double)p->n_micro_steps;
    const double owned = n_total / (stage >= 1 ? n : 1.0);
    double exposed_s = 0.0, beside_s = passes * t.beside_s;

    if (t.beside_s > t.compute_s) exposed_s += passes * (t.beside_s - t.compute_s);
    if (stage >= 3) exposed_s += passes * first * width; // nothing to compute before the first unit
    if (stage >= 2) exposed_s += first * wire;           // nor behind the last gradient
    if (stage < 2) { // once a step, behind the last backward pass
        const double backward_s = t.compute_s * 2.0 / 3.0;
        if (reduce_s > backward_s) exposed_s += reduce_s - backward_s;
        beside_s += reduce_s;
    }
    if (stage == 1 || stage == 2) exposed_s += gather_s; // new weights, before the next step
    p->comm_exposed_s = exposed_s;
    if (gpu) exposed_s += collective_share * (beside_s < passes * t.compute_s ? beside_s : 0.0);
    p->step_s = passes * t.compute_s + exposed_s +
                owned * (4.0 + 12.0 + 12.0 + width) / d->memory_bytes_s; // AdamW reads and writes
    p->tokens_per_s = (double)p->tokens_per_step / p->step_s;
    p->mfu = p->tokens_per_s / n * p->flops_train / d->peak_flops;
}

/* ---- the plan ---- */

/* What to change, most effective first. */
static const char *remedy(const struct ht_plan *p, const struct ht_config *c, bool gpu,
                          int64_t short_by)
{
    const struct ht_plan_bytes *b = &p->bytes;
    const int64_t tokens = b->activations + b->scratch;

    if (tokens > short_by && c->train.recompute != HT_RECOMPUTE_FULL)
        return "set train.recompute to \"full\", or lower train.micro_batch";
    if (tokens / 2 > short_by && c->train.micro_batch > 1) return "lower train.micro_batch";
    if (c->parallel.zero_stage < 3 && p->n_ranks > 1)
        return "raise parallel.zero_stage, or use more ranks";
    if (!gpu && c->checkpoint.background && b->buffers > short_by)
        return "set checkpoint.background to false";
    return gpu ? "use more ranks, or a smaller model" : "use more machines, or a smaller model";
}

static enum ht_status check_fit(const struct ht_plan *p, const struct ht_config *c, bool gpu)
{
    const double room = p->device.memory_bytes * 0.95; // the rest is the system's
    const double gib = 1073741824.0;

    if ((double)p->bytes.total <= room) return HT_OK;
    const double lacking = (double)p->bytes.total - room;
    return HT_FAIL(
        HT_ERR_MEMORY,
        "%s: a rank needs %.2f GiB (weights %.2f, gradients %.2f, optimizer %.2f, activations "
        "%.2f, scratch %.2f, buffers %.2f, program %.2f); %s has %.2f GiB for it: %.2f GiB "
        "short; %s",
        c->train.name, (double)p->bytes.total / gib, (double)p->bytes.weights / gib,
        (double)p->bytes.gradients / gib, (double)p->bytes.optimizer / gib,
        (double)p->bytes.activations / gib, (double)p->bytes.scratch / gib,
        (double)p->bytes.buffers / gib, (double)p->bytes.program / gib, p->device.name, room / gib,
        lacking / gib, remedy(p, c, gpu, (int64_t)lacking));
}

static enum ht_status refuse_fp8(const struct ht_plan *p)
{
    return HT_FAIL(HT_ERR_UNSUPPORTED,
                   "train.linear_dtype is \"fp8\" and %s does not multiply fp8; plan for h100 or "
                   "h200, or set it to \"model\"",
                   p->device.name);
}

static enum ht_status plan_on(struct ht_plan *p, const struct ht_config *c,
                              const struct ht_tensor_list *l, bool gpu)
{
    p->bytes =
        (struct ht_plan_bytes){ .activations = p->bytes.activations, .scratch = p->bytes.scratch };
    plan_bytes(p, c, l, gpu);
    plan_time(p, c, l, gpu);
    return check_fit(p, c, gpu);
}

enum ht_status ht_plan_make(struct ht_plan *out, const struct ht_config *c, int n_ranks,
                            const char *device_name, int64_t activation_bytes,
                            int64_t scratch_bytes)
{
    const int64_t per_pass = c->train.micro_batch * c->data.seq_len;
    const double seq = (double)c->data.seq_len;
    const bool fp8 = c->train.linear_dtype == HT_LINEAR_FP8;
    struct ht_tensor_list list;
    enum ht_status st;

    *out = (struct ht_plan){ .n_ranks = n_ranks,
                             .tokens_per_step = c->train.global_batch_tokens,
                             .total_steps = c->train.total_steps };
    if (n_ranks < 1) return HT_FAIL(HT_ERR_ARG, "a plan for %d ranks; at least 1", n_ranks);
    HT_TRY(ht_tensor_list_create(&list, &c->model, c->optimizer.decay));
    out->n_params = list.n_params;
    out->n_tensors = list.n_tensors;
    out->flops_forward = ht_flops_forward(&c->model, seq);
    out->flops_train = 3.0 * out->flops_forward;
    out->n_micro_steps = (out->tokens_per_step + per_pass * n_ranks - 1) / (per_pass * n_ranks);
    out->total_tokens = (double)out->tokens_per_step * (double)out->total_steps;
    out->bytes.activations = activation_bytes;
    out->bytes.scratch = scratch_bytes;

    if (!device_name || !strcmp(device_name, "cpu")) {
        out->device = cpu_model(c, n_ranks);
        st = plan_on(out, c, &list, false);
        if (fp8) st = refuse_fp8(out);
        if (st == HT_OK || device_name) goto done;
        device_name = "h100";
    }
    if (!find_gpu(&out->device, device_name, c, n_ranks))
        st = HT_FAIL(HT_ERR_ARG,
                     "\"%s\" is not a device to plan for; they are cpu, h100, h200 and a100",
                     device_name);
    else
        st = out->device.matmul_flops > 0.0 ? plan_on(out, c, &list, true) : refuse_fp8(out);
done:
    ht_tensor_list_free(&list);
    return st;
}
