/* tests/faults/ckpt_diff.c: are two checkpoints the same state, bit for bit?
 *
 *   ckpt_diff A B              0 equal, 1 different (each differing tensor is printed), 3 not
 * readable ckpt_diff --close TOL A B  the same, but each tensor's weights may differ by TOL * their
 * norm, and the moments are not looked at ckpt_diff --state A B      step, tokens, loader and
 * trainer state only
 *
 * Compared: names, shapes, masters and both moments of every tensor, step, tokens, loader and
 * trainer state. The rank counts that wrote them may differ.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoints/checkpoint.h"
#include "checkpoints/folder.h"

/* The checkpoint's tensors one after the other as a list to read by. */
static enum ht_status list_of(struct ht_tensor_list *l, const char *path)
{
    struct ht_manifest m;
    enum ht_status st = HT_OK;

    memset(l, 0, sizeof *l);
    HT_TRY(ht_ckpt_folder_open(&m, path));
    l->n_tensors = m.n_tensors;
    l->tensors = calloc((size_t)m.n_tensors + 1, sizeof *l->tensors);
    if (!l->tensors) st = HT_FAIL(HT_ERR_MEMORY, "no memory for %d tensors", m.n_tensors);
    for (int i = 0; st == HT_OK && i < m.n_tensors; i++) {
        struct ht_tensor_info *t = &l->tensors[i];
        snprintf(t->name, sizeof t->name, "%s", m.tensors[i].name);
        t->n_dims = m.tensors[i].n_dims;
        memcpy(t->shape, m.tensors[i].shape, sizeof t->shape);
        t->n = m.tensors[i].n;
        t->offset = l->n_total;
        l->n_total += t->n;
    }
    ht_manifest_free(&m);
    return st;
}

static enum ht_status compare_array(int *n_different, struct ht_ckpt *c[2], int array,
                                    const struct ht_tensor_list *l)
{
    const size_t n_bytes = (size_t)l->n_total * sizeof(float);
    float *a = malloc(n_bytes + 1), *b = malloc(n_bytes + 1);
    enum ht_status st = HT_OK;

    if (!a || !b) {
        st = HT_FAIL(HT_ERR_MEMORY, "no memory for 2 x %zu bytes", n_bytes);
        goto done;
    }
    HT_TRY_GOTO(st, done, ht_ckpt_read_flat(c[0], (enum ht_ckpt_array)array, l, 0, l->n_total, a));
    HT_TRY_GOTO(st, done, ht_ckpt_read_flat(c[1], (enum ht_ckpt_array)array, l, 0, l->n_total, b));
    for (int i = 0; i < l->n_tensors; i++) {
        const struct ht_tensor_info *t = &l->tensors[i];
        int64_t n = 0;
        for (int64_t k = t->offset; k < t->offset + t->n; k++)
            n += memcmp(&a[k], &b[k], sizeof *a) != 0;
        if (n)
            printf("%s of %s: %lld of %lld elements differ\n", ht_ckpt_array_names[array], t->name,
                   (long long)n, (long long)t->n);
        *n_different += n > 0;
    }
done:
    free(a);
    free(b);
    return st;
}

/* Norm of each tensor's difference against the norm of the tensor. */
static enum ht_status compare_close(int *n_different, struct ht_ckpt *c[2],
                                    const struct ht_tensor_list *l, double tolerance)
{
    const size_t n_bytes = (size_t)l->n_total * sizeof(float);
    float *a = malloc(n_bytes + 1), *b = malloc(n_bytes + 1);
    enum ht_status st = HT_OK;
    double worst = 0.0;

    if (!a || !b) {
        st = HT_FAIL(HT_ERR_MEMORY, "no memory for 2 x %zu bytes", n_bytes);
        goto done;
    }
    HT_TRY_GOTO(st, done, ht_ckpt_read_flat(c[0], HT_CKPT_MASTER, l, 0, l->n_total, a));
    HT_TRY_GOTO(st, done, ht_ckpt_read_flat(c[1], HT_CKPT_MASTER, l, 0, l->n_total, b));
    for (int i = 0; i < l->n_tensors; i++) {
        const struct ht_tensor_info *t = &l->tensors[i];
        double norm = 0.0, difference = 0.0;
        for (int64_t k = t->offset; k < t->offset + t->n; k++) {
            norm += (double)a[k] * (double)a[k];
            difference += ((double)a[k] - (double)b[k]) * ((double)a[k] - (double)b[k]);
        }
        const double share = difference > 0.0 ? sqrt(difference / norm) : 0.0;
        if (!(share <= tolerance)) { // a NaN is not close
            printf("%s: weights differ by %.3g of their norm\n", t->name, share);
            (*n_different)++;
        }
        if (share > worst) worst = share;
    }
    printf("weights differ by at most %.3g of a tensor's norm\n", worst);
done:
    free(a);
    free(b);
    return st;
}

static int compare_text(const char *what, const char *a, const char *b)
{
    if (strcmp(a, b) == 0) return 0;
    printf("%s differs:\n  %s  %s", what, a, b);
    return 1;
}

enum what { EVERYTHING, CLOSE, STATE };

static enum ht_status compare(int *n_different, char **path, enum what what, double tolerance)
{
    struct ht_ckpt *c[2] = { NULL, NULL };
    struct ht_tensor_list l = { 0 };
    enum ht_status st = HT_OK;

    for (int i = 0; i < 2; i++) HT_TRY_GOTO(st, done, ht_ckpt_open(&c[i], path[i]));
    HT_TRY_GOTO(st, done, list_of(&l, path[0]));
    if (what == CLOSE) HT_TRY_GOTO(st, done, compare_close(n_different, c, &l, tolerance));
    for (int a = 0; what == EVERYTHING && a < HT_CKPT_ARRAYS; a++)
        HT_TRY_GOTO(st, done, compare_array(n_different, c, a, &l));
    if (ht_ckpt_step(c[0]) != ht_ckpt_step(c[1]) || ht_ckpt_tokens(c[0]) != ht_ckpt_tokens(c[1])) {
        printf("step %lld, %lld tokens and step %lld, %lld tokens\n", (long long)ht_ckpt_step(c[0]),
               (long long)ht_ckpt_tokens(c[0]), (long long)ht_ckpt_step(c[1]),
               (long long)ht_ckpt_tokens(c[1]));
        (*n_different)++;
    }
    *n_different +=
        compare_text("loader.json", ht_ckpt_loader_json(c[0]), ht_ckpt_loader_json(c[1]));
    *n_different += compare_text("state.json", ht_ckpt_state_json(c[0]), ht_ckpt_state_json(c[1]));
    if (*n_different == 0 && what == EVERYTHING)
        printf("equal: step %lld, 3 x %d tensors, %lld elements, bit for bit\n",
               (long long)ht_ckpt_step(c[0]), l.n_tensors, 3 * (long long)l.n_total);
done:
    free(l.tensors);
    ht_ckpt_close(c[0]);
    ht_ckpt_close(c[1]);
    return st;
}

int main(int argc, char **argv)
{
    enum what what = EVERYTHING;
    double tolerance = 0.0;
    int n_different = 0;

    if (argc == 5 && strcmp(argv[1], "--close") == 0) {
        what = CLOSE;
        tolerance = atof(argv[2]);
    } else if (argc == 4 && strcmp(argv[1], "--state") == 0) {
        what = STATE;
    } else if (argc != 3) {
        fputs("usage: ckpt_diff [--close TOLERANCE | --state] A B\n", stderr);
        return 2;
    }
    const enum ht_status st = compare(&n_different, argv + argc - 2, what, tolerance);
    if (st != HT_OK) {
        fprintf(stderr, "ckpt_diff: %s\n", ht_error_message());
        return 3;
    }
    return n_different ? 1 : 0;
}
