# Scan, convolution and gated norm on the CUDA backend.
set(ssm_case ${CMAKE_SOURCE_DIR}/tests/core/ops/ops_case.c ${CMAKE_SOURCE_DIR}/tests/ref/ssm_ref.c)
ht_add_emu_test(test_ssd_cuda
  SOURCES test_ssd_cuda.c ${CMAKE_SOURCE_DIR}/tests/ssm/scan_case.c ${ssm_case}
  LINK ht_ssm ht_base)
ht_add_emu_test(test_conv1d_cuda SOURCES test_conv1d_cuda.c ${ssm_case} LINK ht_ssm ht_base)
ht_add_emu_test(test_gated_norm_cuda SOURCES test_gated_norm_cuda.c ${ssm_case} LINK ht_ssm ht_base)
