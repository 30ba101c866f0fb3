# Collectives and ZeRO on device memory, over a double of NCCL (nccl_emu.cpp): under mpirun.
if(HT_EMU)
  foreach(program test_nccl_emu nccl_job)
    string(REPLACE "_emu" "" source ${program})
    add_executable(${program} ${source}.c gpu_case.c)
    target_link_libraries(${program} PRIVATE ht_emu_distributed ht_emu_base ht_flags PkgConfig::CHECK)
    set_target_properties(${program} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests
                                                LINKER_LANGUAGE CXX)
  endforeach()
  foreach(ranks 1 2 3 4)
    add_test(NAME test_nccl_emu_n${ranks}
             COMMAND ${MPIEXEC_EXECUTABLE} -n ${ranks} --oversubscribe --allow-run-as-root
                     $<TARGET_FILE:test_nccl_emu>)
    set_tests_properties(test_nccl_emu_n${ranks} PROPERTIES LABELS "emu;mpi" TIMEOUT 300 PROCESSORS 2
                         ENVIRONMENT "CK_FORK=no;OMP_NUM_THREADS=1;ASAN_OPTIONS=detect_leaks=0")
  endforeach()
  ht_add_test(test_nccl_faults SOURCES test_nccl_faults.c LINK ht_base LABELS emu mpi)
  target_compile_definitions(test_nccl_faults PRIVATE MPIEXEC="${MPIEXEC_EXECUTABLE}"
                                                      FAULT_JOB="$<TARGET_FILE:nccl_job>")
  add_dependencies(test_nccl_faults nccl_job)
endif()
