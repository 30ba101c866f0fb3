/* core/base/thread.h: how long idle OpenMP threads spin. */
#ifndef HT_BASE_THREAD_H
#define HT_BASE_THREAD_H

/* Call first in main. libgomp's threads spin for milliseconds between parallel regions, which costs a busy machine
 * far more than its share (a region of two threads took 4 ms beside one busy neighbour, measured on two cores). Unless
 * the user has chosen (OMP_WAIT_POLICY or GOMP_SPINCOUNT), starts the program again with a short spin: the
 * setting is read before main. */
void ht_thread_limit_spinning(char **argv);

#endif
