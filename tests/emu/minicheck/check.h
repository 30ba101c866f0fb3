/* tests/emu/minicheck/check.h: as much of libcheck as the suites over the CUDA backend use.
 *
 * For machines with a GPU where libcheck is not installed (HT_KERNELS_ONLY). Tests run in this
 * process, one after another; a failed assertion ends its test.
 */
#ifndef HT_MINICHECK_H
#define HT_MINICHECK_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

typedef struct Suite Suite;
typedef struct TCase TCase;
typedef struct SRunner SRunner;
typedef void minicheck_test(int _i);
struct minicheck_entry {
    const char *name;
    minicheck_test *run;
};
enum { CK_NOFORK, CK_FORK };
enum { CK_SILENT, CK_MINIMAL, CK_NORMAL, CK_VERBOSE };

#define START_TEST(test)                                                                           \
    static void test##_run(int _i);                                                                \
    static const struct minicheck_entry test = { #test, test##_run };                              \
    static void test##_run(int _i __attribute__((unused)))                                         \
    {
#define END_TEST }

Suite *suite_create(const char *name);
TCase *tcase_create(const char *name);
void suite_add_tcase(Suite *s, TCase *t);
void minicheck_add(TCase *t, struct minicheck_entry e, int first, int end);
#define tcase_add_test(t, test) minicheck_add((t), (test), 0, 1)
#define tcase_add_loop_test(t, test, first, end) minicheck_add((t), (test), (first), (end))
SRunner *srunner_create(Suite *s);
void srunner_set_fork_status(SRunner *r, int status);
void srunner_run_all(SRunner *r, int print);
int srunner_ntests_failed(SRunner *r);
void srunner_free(SRunner *r);

_Noreturn void minicheck_fail(const char *file, int line, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

#define ck_abort_msg(...) minicheck_fail(__FILE__, __LINE__, __VA_ARGS__)
#define ck_assert_msg(e, ...)                                                                      \
    do {                                                                                           \
        if (!(e)) minicheck_fail(__FILE__, __LINE__, __VA_ARGS__);                                 \
    } while (0)
#define ck_assert(e) ck_assert_msg(e, "%s", #e)
#define MINICHECK_COMPARE(type, format, a, op, b)                                                  \
    do {                                                                                           \
        const type a_ = (a), b_ = (b);                                                             \
        if (!(a_ op b_))                                                                           \
            minicheck_fail(__FILE__, __LINE__, "%s %s %s: " format " and " format, #a, #op, #b,    \
                           a_, b_);                                                                \
    } while (0)
#define ck_assert_int_eq(a, b) MINICHECK_COMPARE(long long, "%lld", a, ==, b)
#define ck_assert_int_ne(a, b) MINICHECK_COMPARE(long long, "%lld", a, !=, b)
#define ck_assert_int_lt(a, b) MINICHECK_COMPARE(long long, "%lld", a, <, b)
#define ck_assert_int_le(a, b) MINICHECK_COMPARE(long long, "%lld", a, <=, b)
#define ck_assert_int_gt(a, b) MINICHECK_COMPARE(long long, "%lld", a, >, b)
#define ck_assert_int_ge(a, b) MINICHECK_COMPARE(long long, "%lld", a, >=, b)
#define ck_assert_uint_eq(a, b) MINICHECK_COMPARE(unsigned long long, "%llu", a, ==, b)
#define ck_assert_uint_le(a, b) MINICHECK_COMPARE(unsigned long long, "%llu", a, <=, b)
#define ck_assert_double_eq(a, b) MINICHECK_COMPARE(double, "%.17g", a, ==, b)
#define ck_assert_double_le(a, b) MINICHECK_COMPARE(double, "%.9g", a, <=, b)
#define ck_assert_double_lt(a, b) MINICHECK_COMPARE(double, "%.9g", a, <, b)
#define ck_assert_double_ge(a, b) MINICHECK_COMPARE(double, "%.9g", a, >=, b)
#define ck_assert_double_gt(a, b) MINICHECK_COMPARE(double, "%.9g", a, >, b)
#define ck_assert_double_eq_tol(a, b, tol) MINICHECK_COMPARE(double, "%.9g", fabs((a) - (b)), <=, tol)
#define ck_assert_double_nan(a) ck_assert(isnan(a))
#define ck_assert_float_eq(a, b) MINICHECK_COMPARE(double, "%.9g", (double)(a), ==, (double)(b))
#define ck_assert_float_nan(a) ck_assert(isnan(a))
#define ck_assert_ptr_null(p) ck_assert((p) == NULL)
#define ck_assert_ptr_nonnull(p) ck_assert((p) != NULL)
#define ck_assert_ptr_eq(a, b) ck_assert((const void *)(a) == (const void *)(b))
#define ck_assert_mem_eq(a, b, n) ck_assert(memcmp((a), (b), (n)) == 0)
#define ck_assert_mem_ne(a, b, n) ck_assert(memcmp((a), (b), (n)) != 0)
#define ck_assert_str_eq(a, b) ck_assert(strcmp((a), (b)) == 0)

#endif
