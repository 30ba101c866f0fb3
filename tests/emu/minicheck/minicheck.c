/* tests/emu/minicheck/minicheck.c: see check.h beside it. */
#include "check.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

enum { MAX_TESTS = 256, MAX_CASES = 16 };

struct added {
    struct minicheck_entry test;
    int first, end;
};
struct TCase {
    struct added tests[MAX_TESTS];
    int n;
};
struct Suite {
    const char *name;
    TCase *cases[MAX_CASES];
    int n;
};
struct SRunner {
    Suite *suite;
    int run, failed;
};

static jmp_buf failure;
static const char *running;
static int running_i;

Suite *suite_create(const char *name)
{
    Suite *s = calloc(1, sizeof *s);
    if (!s) abort();
    s->name = name;
    return s;
}

TCase *tcase_create(const char *name)
{
    TCase *t = calloc(1, sizeof *t);
    (void)name;
    if (!t) abort();
    return t;
}

void suite_add_tcase(Suite *s, TCase *t)
{
    if (s->n == MAX_CASES) abort();
    s->cases[s->n++] = t;
}

void minicheck_add(TCase *t, struct minicheck_entry e, int first, int end)
{
    if (t->n == MAX_TESTS) abort();
    t->tests[t->n++] = (struct added){ e, first, end };
}

SRunner *srunner_create(Suite *s)
{
    SRunner *r = calloc(1, sizeof *r);
    if (!r) abort();
    r->suite = s;
    return r;
}

void srunner_set_fork_status(SRunner *r, int status)
{
    (void)r;
    (void)status;
}

void minicheck_fail(const char *file, int line, const char *format, ...)
{
    va_list args;

    printf("%s:%d:F:%s:%d: ", file, line, running, running_i);
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    printf("\n");
    longjmp(failure, 1);
}

static void run_one(SRunner *r, const struct added *a, int i)
{
    running = a->test.name;
    running_i = i;
    r->run++;
    if (setjmp(failure) == 0)
        a->test.run(i);
    else
        r->failed++;
}

void srunner_run_all(SRunner *r, int print)
{
    (void)print;
    for (int c = 0; c < r->suite->n; c++)
        for (int t = 0; t < r->suite->cases[c]->n; t++) {
            const struct added *a = &r->suite->cases[c]->tests[t];
            for (int i = a->first; i < a->end; i++) run_one(r, a, i);
        }
    printf("%s: %d tests, %d failed\n", r->suite->name, r->run, r->failed);
    fflush(stdout);
}

int srunner_ntests_failed(SRunner *r)
{
    return r->failed;
}

void srunner_free(SRunner *r)
{
    for (int c = 0; c < r->suite->n; c++) free(r->suite->cases[c]);
    free(r->suite);
    free(r);
}
