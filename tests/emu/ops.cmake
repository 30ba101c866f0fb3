# core/ops on the CUDA backend.
foreach(suite rows loss adamw)
  ht_add_emu_test(test_${suite}_cuda
    SOURCES test_${suite}_cuda.c ${CMAKE_SOURCE_DIR}/tests/core/ops/ops_case.c
            ${CMAKE_SOURCE_DIR}/tests/ref/ops_ref.c
    LINK ht_ops ht_base)
endforeach()
ht_add_emu_test(test_quant_cuda SOURCES test_quant_cuda.c LINK ht_ops ht_base)
ht_add_emu_test(test_fp8_cuda SOURCES test_fp8_cuda.c LINK ht_ops ht_base)
