/* tests/emu/comm_nccl_emu.cpp: the communicator over the double of NCCL. A thread of its own runs
 * in it, so it has no instrumented loads and stores: it launches no kernels of its own. */
#include "distributed/comm_nccl.cu"
