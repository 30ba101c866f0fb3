# The emulation itself: its constructs, and the mistakes that it must find. Not for a GPU.
if(HT_EMU)
  ht_add_emu_twin(ht_probe SOURCES "" CUDA emu_probe.cu LINK ht_base)
  set_property(TARGET ht_emu_probe PROPERTY LINKER_LANGUAGE CXX)
  add_executable(test_emu test_emu.c gpu_case.c)
  target_link_libraries(test_emu PRIVATE ht_emu_probe ht_emu_base ht_flags PkgConfig::CHECK)
  set_target_properties(test_emu PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
  foreach(order forward reverse)
    add_test(NAME test_emu_${order} COMMAND test_emu)
    set_tests_properties(test_emu_${order} PROPERTIES LABELS emu TIMEOUT 120
                         ENVIRONMENT "CK_FORK=no;HT_EMU_ORDER=${order}")
  endforeach()
endif()

# What the kernels use, and the list of kernels with their state on GPUs.
if(HT_CUDA_FOUND)
  add_test(NAME kernel_budget COMMAND ${CMAKE_SOURCE_DIR}/scripts/kernel_budget ${CMAKE_BINARY_DIR})
  set_tests_properties(kernel_budget PROPERTIES LABELS unit)
endif()
add_test(NAME gpu_status COMMAND ${CMAKE_SOURCE_DIR}/scripts/gpu_status --check)
set_tests_properties(gpu_status PROPERTIES LABELS unit)
