/* programs/hybridbench_compare.h: one of hybridbench's commands. */
#ifndef HT_PROGRAMS_HYBRIDBENCH_COMPARE_H
#define HT_PROGRAMS_HYBRIDBENCH_COMPARE_H

/* argv[0] is "compare". The program's exit code. */
int ht_bench_compare(int argc, char **argv);

#endif
