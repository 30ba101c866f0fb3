# hybridtrain on the emulated device: the whole loop, against the CPU backend's run.
if(HT_EMU)
  add_executable(hybridtrain_emu ${CMAKE_SOURCE_DIR}/programs/hybridtrain.c)
  target_link_libraries(hybridtrain_emu PRIVATE ht_flags ht_emu_training)
  set_target_properties(hybridtrain_emu PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests
                                                   LINKER_LANGUAGE CXX)
  add_test(NAME train_emu COMMAND bash ${CMAKE_CURRENT_SOURCE_DIR}/test_train_emu.sh
                                  ${CMAKE_RUNTIME_OUTPUT_DIRECTORY} ${CMAKE_SOURCE_DIR})
  set_tests_properties(train_emu PROPERTIES LABELS "emu;mpi" TIMEOUT 1200 PROCESSORS 2
                       ENVIRONMENT "${HT_PROGRAM_TEST_ENV}")
endif()

if(HT_CUDA_FOUND)
  add_test(NAME train_gpu COMMAND bash ${CMAKE_CURRENT_SOURCE_DIR}/test_train_gpu.sh
                                  ${CMAKE_RUNTIME_OUTPUT_DIRECTORY} ${CMAKE_SOURCE_DIR})
  set_tests_properties(train_gpu PROPERTIES LABELS cuda TIMEOUT 1800 SKIP_RETURN_CODE 77 RUN_SERIAL TRUE
                       ENVIRONMENT "${HT_PROGRAM_TEST_ENV}")
endif()
