/* tests/emu/flash_fwd_sm90_emu.cpp: the Hopper kernel on the host; nvcc compiles it for sm_90a
 * only. */
#include "attention/flash_fwd_sm90.cu"
