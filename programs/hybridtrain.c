/* programs/hybridtrain.c: train a recipe, or plan it. Argument parsing and exit codes, nothing
 * else. */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

#include "core/base/file.h"
#include "core/base/isa.h"
#include "core/base/thread.h"
#include "core/base/log.h"
#include "core/config/recipe.h"
#include "core/model/cluster.h"
#include "distributed/comm.h"
#include "training/device.h"
#include "training/signals.h"
#include "training/trainer.h"

static const char help[] =
    "Usage: [mpirun -n N] hybridtrain RECIPE [section.key=value ...] [options]\n"
    "\n"
    "Train the model that RECIPE (a libconfig file, see docs/recipes.md) describes. A run folder "
    "that has a\n"
    "checkpoint is resumed. Ranks share the data and the optimiser state (ZeRO).\n"
    "\n"
    "  --plan               print parameters, FLOPs, memory and predicted step time, then exit\n"
    "  --ranks N            plan for N ranks (default: 1, or a host of 8 GPUs)\n"
    "  --device NAME        plan for cpu, h100, h200 or a100 (default: cpu where it fits)\n"
    "  --dry-run            check recipe, data and memory, then exit\n"
    "  --print-recipe       print the resolved recipe with the origin of each value\n"
    "  --print-hf-config    print the model as a Hugging Face config.json\n"
    "  --print-recipe-docs  print the documentation of every recipe key (docs/recipes.md)\n"
    "  --version, --help\n"
    "\n"
    "Signals: SIGUSR1, SIGTERM, SIGINT to any rank finish the step, save a checkpoint and exit "
    "with "
    "75; a second\n"
    "SIGTERM or SIGINT exits at once. Send SIGUSR1 to mpirun: it passes it on and exits with 75. "
    "SIGTERM reaches\n"
    "the ranks T seconds after mpirun and SIGKILL follows T seconds later (mpirun --mca\n"
    "odls_base_sigkill_timeout T; default 1), and mpirun's exit code is 1.\n"
    "Exit codes: 0 done, 1 failure at run time, 2 usage or recipe, 3 bad input data, 4 no usable "
    "checkpoint,\n"
    "5 out of memory or disk, 6 a peer rank lost or timed out, 7 loss not finite, 75 stopped on "
    "request.\n";

struct arguments {
    const char *recipe, *device;
    char **overrides;
    int n_overrides, ranks;
    bool plan, dry_run, print_recipe, print_hf;
};

static int fail(struct ht_comm *comm, enum ht_status st)
{
    const int code = ht_exit_code(st);
    const bool others = comm && ht_comm_size(comm) > 1;

    if (others && st != HT_ERR_STOPPED) ht_comm_abort(comm, code, ht_error_message());
    if (!comm || ht_comm_rank(comm) == 0) fprintf(stderr, "hybridtrain: %s\n", ht_error_message());
    return code;
}

static int print_and_free(char *text)
{
    fputs(text, stdout);
    free(text);
    return fflush(stdout) == 0 ? 0 : 1;
}

/* 0 = go on, otherwise exit code + 1 */
static int parse(struct arguments *a, int argc, char **argv)
{
    static const struct option options[] = {
        { "plan", 0, NULL, 'p' },
        { "ranks", 1, NULL, 'n' },
        { "device", 1, NULL, 'd' },
        { "dry-run", 0, NULL, 'c' },
        { "print-recipe", 0, NULL, 'r' },
        { "print-hf-config", 0, NULL, 'f' },
        { "print-recipe-docs", 0, NULL, 'D' },
        { "version", 0, NULL, 'v' },
        { "help", 0, NULL, 'h' },
        { NULL, 0, NULL, 0 },
    };
    char *text = NULL, *end;
    int opt;

    while ((opt = getopt_long(argc, argv, "h", options, NULL)) != -1) {
        switch (opt) {
        case 'p': a->plan = true; break;
        case 'd': a->device = optarg; break;
        case 'c': a->dry_run = true; break;
        case 'r': a->print_recipe = true; break;
        case 'f': a->print_hf = true; break;
        case 'n':
            a->ranks = (int)strtol(optarg, &end, 10);
            if (*end || a->ranks < 1 || a->ranks > 1 << 20) {
                fprintf(stderr, "hybridtrain: --ranks is '%s'; it must be from 1 to 1048576\n",
                        optarg);
                return 3;
            }
            break;
        case 'D':
            if (ht_recipe_document(&text) != HT_OK) return fail(NULL, HT_ERR_MEMORY) + 1;
            return print_and_free(text) + 1;
        case 'v':
            printf("hybridtrain %s (CPU backend, best level here: %s)\n", HT_VERSION,
                   ht_isa_name(ht_isa_best()));
            return 1;
        case 'h': fputs(help, stdout); return 1;
        default: fputs("try hybridtrain --help\n", stderr); return 3;
        }
    }
    if (optind >= argc) {
        fputs("hybridtrain: a recipe is missing; try recipes/quickstart.cfg, or --help\n", stderr);
        return 3;
    }
    a->recipe = argv[optind];
    a->overrides = argv + optind + 1;
    a->n_overrides = argc - optind - 1;
    return 0;
}

/* Too large for this machine and no rank count given: a host of eight GPUs. */
static int default_ranks(const struct ht_config *cfg, const struct ht_plan *plan)
{
    const int64_t unit = 8 * cfg->train.micro_batch * cfg->data.seq_len;
    return strcmp(plan->device.name, "cpu") && cfg->train.global_batch_tokens % unit == 0 ? 8 : 1;
}

/* The plan, and for GPUs what it would be on other clusters. A recipe that does not fit is an error
 * after all is printed. */
static enum ht_status print_plan(const struct ht_config *cfg, const struct arguments *a)
{
    static const int sizes[] = { 8, 16, 32, 64, 128, 192, 256 };
    enum { N_SIZES = sizeof sizes / sizeof *sizes };
    struct ht_plan_cluster rows[N_SIZES];
    struct ht_plan plan = { 0 };

    enum ht_status st = ht_model_plan(&plan, cfg, a->ranks ? a->ranks : 1, a->device);
    if (!a->ranks && plan.n_params && default_ranks(cfg, &plan) > 1)
        st = ht_model_plan(&plan, cfg, default_ranks(cfg, &plan), plan.device.name);
    if (st != HT_OK && st != HT_ERR_MEMORY) return st;
    ht_plan_print(stdout, &plan, cfg);
    if (!strcmp(plan.device.name, "cpu")) return st;
    for (int i = 0; i < N_SIZES; i++)
        HT_TRY(ht_model_plan_cluster(&rows[i], cfg, sizes[i], plan.device.name));
    ht_plan_print_cluster(stdout, rows, N_SIZES, cfg);
    if (st == HT_OK) return HT_OK;
    return ht_model_plan(&plan, cfg, (int)plan.n_ranks, plan.device.name); // its message once more
}

/* One job per run folder: the lock goes with the process, whatever ends it. */
static enum ht_status lock_folder(int *fd, const char *dir)
{
    char path[HT_MAX_PATH + 320], owner[256] = "";

    HT_TRY(ht_file_make_dirs(dir));
    snprintf(path, sizeof path, "%s/.lock", dir);
    *fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (*fd < 0) return HT_FAIL(HT_ERR_IO, "%s: %s", path, strerror(errno));
    if (flock(*fd, LOCK_EX | LOCK_NB) != 0) {
        const ssize_t n = read(*fd, owner, sizeof owner - 1);
        if (n > 0) owner[n] = '\0';
        close(*fd);
        *fd = -1;
        return HT_FAIL(HT_ERR_IO, "%s: another run is writing this folder (%s); set train.name",
                       dir, owner[0] ? owner : "unknown process");
    }
    char host[128] = "";
    gethostname(host, sizeof host - 1);
    const int n = snprintf(owner, sizeof owner, "host %s, process %ld", host, (long)getpid());
    if (ftruncate(*fd, 0) != 0 || pwrite(*fd, owner, (size_t)n, 0) != n)
        return HT_FAIL(HT_ERR_IO, "%s: %s", path, strerror(errno));
    return HT_OK;
}

static enum ht_status open_run_files(struct ht_log *log, int *lock_fd, const struct ht_config *cfg,
                                     const struct ht_recipe *recipe)
{
    char dir[HT_MAX_PATH + 300], path[HT_MAX_PATH + 320];
    char *text = NULL;

    snprintf(dir, sizeof dir, "%s/%s", cfg->train.out_dir, cfg->train.name);
    HT_TRY(lock_folder(lock_fd, dir));
    snprintf(path, sizeof path, "%s/train.log", dir);
    log->file = fopen(path, "ae");
    if (!log->file) return HT_FAIL(HT_ERR_IO, "%s: %s", path, strerror(errno));
    snprintf(path, sizeof path, "%s/recipe.cfg", dir);
    HT_TRY(ht_recipe_print(&text, recipe, 0));
    const enum ht_status st = ht_file_publish(path, text, strlen(text));
    free(text);
    return st;
}

/* A recipe for GPUs on a machine without: say so, and what can be done here. */
static enum ht_status check_memory(struct ht_plan *plan, const struct ht_config *cfg,
                                   const char *recipe, struct ht_comm *comm)
{
    const enum ht_status st = ht_model_plan(plan, cfg, ht_comm_local_size(comm), "cpu");
    char text[1024], why[512], ranks[32];
    struct ht_plan gpus;
    int n;

    if (st != HT_ERR_MEMORY) return st;
    snprintf(text, sizeof text, "%s", ht_error_message());
    snprintf(ranks, sizeof ranks, " --ranks %d", ht_comm_size(comm));
    if (cfg->parallel.device == HT_DEVICE_CPU || ht_backend_count_cuda(&n, NULL) == HT_OK)
        why[0] = '\0';
    else
        snprintf(why, sizeof why, " (%s)", ht_error_message());
    const bool fits = ht_model_plan(&gpus, cfg, ht_comm_size(comm), "h100") == HT_OK;
    return HT_FAIL(
        st,
        "%s. On %d GPU(s) of 80 GB it would %s; this run is on CPUs%s. See the plan with: "
        "hybridtrain --plan%s --device h100 %s; recipes for a machine like this "
        "one: recipes/quickstart.cfg, recipes/debug_tiny.cfg",
        text, ht_comm_size(comm), fits ? "fit" : "not fit either", why, fits ? ranks : "", recipe);
}

/* What the ranks will run on, and whether the recipe fits it. */
static enum ht_status check_device(struct ht_plan *plan, enum ht_backend_kind *kind,
                                   const struct ht_config *cfg, const char *recipe,
                                   struct ht_comm *comm)
{
    const double gib = 1073741824.0;
    size_t memory_bytes;

    HT_TRY(ht_train_device(kind, &memory_bytes, cfg, comm));
    if (*kind == HT_BACKEND_CPU) return check_memory(plan, cfg, recipe, comm);
    // sizes do not depend on which GPU it is; how much memory this host's have is known here
    const enum ht_status st = ht_model_plan(plan, cfg, ht_comm_size(comm), "h100");
    if (st != HT_OK && st != HT_ERR_MEMORY) return st;
    const double room = 0.95 * (double)memory_bytes, need = (double)plan->bytes.total;
    if (need <= room) return HT_OK;
    return HT_FAIL(
        HT_ERR_MEMORY,
        "%s: a rank needs %.2f GiB, and the smallest GPU here has %.2f for it. What fits: "
        "hybridtrain --plan --ranks %d --device h100 %s",
        cfg->train.name, need / gib, room / gib, ht_comm_size(comm), recipe);
}

static enum ht_status train(struct ht_comm *comm, const struct ht_config *cfg,
                            const struct ht_recipe *recipe, const char *path, bool dry_run)
{
    const int rank = ht_comm_rank(comm), n_ranks = ht_comm_size(comm);
    struct ht_log log = { .level = HT_LOG_INFO, .rank = rank, .n_ranks = n_ranks };
    enum ht_backend_kind kind = HT_BACKEND_CPU;
    struct ht_plan plan;
    enum ht_status st = HT_OK;
    int lock_fd = -1;

    ht_comm_set_timeout(comm, cfg->parallel.timeout_s);
    st = check_device(&plan, &kind, cfg, path, comm);
    if (st != HT_OK && rank == 0) return st; // and ends all: most likely all refuse, one says it
    HT_TRY(ht_comm_barrier(comm));
    if (st != HT_OK) return st;
    if (dry_run) {
        if (rank == 0) printf("%s: recipe and memory are fine\n", cfg->train.name);
        return HT_OK;
    }
    if (rank == 0) {
        log.terminal = stderr;
        log.n_ranks = 1; // no rank prefix: only rank 0 reports
        HT_TRY_GOTO(st, done, open_run_files(&log, &lock_fd, cfg, recipe));
        HT_INFO(&log, "%s: %lld parameters, %d rank(s), %lld tokens a step, %lld steps, %s",
                cfg->train.name, (long long)plan.n_params, n_ranks, (long long)plan.tokens_per_step,
                (long long)plan.total_steps,
                kind == HT_BACKEND_CUDA ? "CUDA" : ht_isa_name(ht_isa_detect()));
    }
    HT_TRY_GOTO(st, done, ht_comm_barrier(comm)); // the folder is there, and ours
    HT_TRY_GOTO(st, done, ht_train(cfg, recipe, comm, &log));
done:
    if (log.file) fclose(log.file);
    if (lock_fd >= 0) close(lock_fd);
    return st;
}

int main(int argc, char **argv)
{
    struct arguments a = { 0 };
    struct ht_config *cfg = calloc(1, sizeof *cfg);
    struct ht_recipe *recipe = NULL;
    struct ht_comm *comm = NULL;
    char *text = NULL;

    ht_signals_block_thread(); // until there are handlers: a request to stop is never lost
    ht_thread_limit_spinning(argv);
    int code = parse(&a, argc, argv);
    if (code || !cfg) {
        free(cfg);
        return code ? code - 1 : 5;
    }
    code = 0;
    enum ht_status st = HT_OK;
    if (a.plan || a.print_recipe || a.print_hf) ht_signals_unblock_thread();
    if (a.plan || a.print_recipe || a.print_hf) { // without MPI: plans are made on laptops
        HT_TRY_GOTO(st, done,
                    ht_recipe_load(cfg, &recipe, a.recipe, a.n_overrides, a.overrides,
                                   a.ranks ? a.ranks : 1));
        if (a.print_recipe) {
            HT_TRY_GOTO(st, done, ht_recipe_print(&text, recipe, 1));
            code = print_and_free(text);
        } else if (a.print_hf) {
            HT_TRY_GOTO(st, done, ht_model_config_to_hf(&text, &cfg->model));
            code = print_and_free(text);
        } else {
            st = print_plan(cfg, &a);
        }
        goto done;
    }
    HT_TRY_GOTO(st, done, ht_signals_install());
    HT_TRY_GOTO(st, done, ht_comm_init(&comm, &argc, &argv));
    HT_TRY_GOTO(
        st, done,
        ht_recipe_load(cfg, &recipe, a.recipe, a.n_overrides, a.overrides, ht_comm_size(comm)));
    HT_TRY_GOTO(st, done, train(comm, cfg, recipe, a.recipe, a.dry_run));
done:
    if (st != HT_OK) code = fail(comm, st);
    ht_comm_finalize(comm);
    ht_recipe_free(recipe);
    free(cfg);
    return code;
}
