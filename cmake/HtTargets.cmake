# Helpers that every folder's CMakeLists.txt uses.

# maybe-uninitialized depends on how far the optimiser looks: at -O3 gcc 12 sees paths that do not exist
set(HT_WARNINGS -Wall -Wextra -Wshadow -Wconversion -Wvla -Werror
  $<$<C_COMPILER_ID:GNU>:-Wno-error=maybe-uninitialized>)

add_library(ht_flags INTERFACE)
target_compile_options(ht_flags INTERFACE
  "$<$<COMPILE_LANGUAGE:C>:${HT_WARNINGS}>"
  "$<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Wshadow;-Wno-unknown-pragmas;-Werror;$<$<CXX_COMPILER_ID:GNU>:-Wno-error=maybe-uninitialized>>"
  "$<$<COMPILE_LANGUAGE:C,CXX>:-fno-math-errno;-fno-trapping-math;-ffp-contract=fast>")
target_compile_definitions(ht_flags INTERFACE _GNU_SOURCE HT_VERSION="${PROJECT_VERSION}")
target_include_directories(ht_flags INTERFACE ${CMAKE_SOURCE_DIR})
target_link_libraries(ht_flags INTERFACE OpenMP::OpenMP_C Threads::Threads m)
if(HT_SANITIZE)
  target_compile_options(ht_flags INTERFACE
    "$<$<COMPILE_LANGUAGE:C,CXX>:-fsanitize=${HT_SANITIZE};-fno-omit-frame-pointer;-fno-sanitize-recover=all>")
  target_link_options(ht_flags INTERFACE -fsanitize=${HT_SANITIZE})
endif()

# ht_add_library(name SOURCES a.c ... [KERNELS k_cpu.c ...] [LINK targets]
#                [CUDA a_cuda.cu ...] [CUDA_ONLY b.cu ...] [EMU b_emu.cpp ...])
# CUDA files are compiled by nvcc where there is one, and as C++ into the library's twin for the
# tests (cmake/Cuda.cmake); CUDA_ONLY are left out of the twin, EMU take their place. KERNELS are compiled once per CPU level; HT_ISA_FN(name) gives each copy its own symbol
# (core/base/isa.h) and a table picks one at run time.
function(ht_add_library name)
  cmake_parse_arguments(A "" "" "SOURCES;KERNELS;LINK;CUDA;CUDA_ONLY;EMU" ${ARGN})
  set(objects "")
  if(A_KERNELS)
    set(levels plain)
    if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
      list(APPEND levels avx2 avx512 avx512bf16)
    endif()
    set(flags_plain "")
    set(flags_avx2 -mavx2 -mfma -mf16c)
    set(flags_avx512 ${flags_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512cd
                     -mprefer-vector-width=512)
    set(flags_avx512bf16 ${flags_avx512} -mavx512bf16 -mavx512vnni)
    foreach(level ${levels})
      add_library(${name}_${level} OBJECT ${A_KERNELS})
      target_compile_options(${name}_${level} PRIVATE -O3 ${flags_${level}})
      target_compile_definitions(${name}_${level} PRIVATE HT_ISA=${level})
      target_link_libraries(${name}_${level} PRIVATE ht_flags ${A_LINK})
      list(APPEND objects $<TARGET_OBJECTS:${name}_${level}>)
    endforeach()
  endif()
  add_library(${name} STATIC ${A_SOURCES} ${objects})
  target_link_libraries(${name} PUBLIC ht_flags ${A_LINK})
  if(HT_CUDA_FOUND AND (A_CUDA OR A_CUDA_ONLY))
    ht_add_cuda_sources(${name} ${A_CUDA} ${A_CUDA_ONLY})
  endif()
  if(HT_EMU)
    ht_add_emu_twin(${name} SOURCES ${A_SOURCES} ${objects} CUDA ${A_CUDA} EMU ${A_EMU}
                    LINK ${A_LINK})
  endif()
endfunction()

# ht_add_program(name SOURCE LINK targets): lands in build/bin and is installed.
function(ht_add_program name)
  cmake_parse_arguments(A "" "" "SOURCES;LINK" ${ARGN})
  add_executable(${name} ${A_SOURCES})
  target_link_libraries(${name} PRIVATE ht_flags ${A_LINK})
  install(TARGETS ${name} RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
endfunction()

# ht_add_test(name SOURCES .. LINK .. [LABELS unit] [MPI 2 4] [TIMEOUT s]): one executable per suite.
# With MPI the suite runs once per rank count, under mpirun, with CK_FORK=no.
function(ht_add_test name)
  cmake_parse_arguments(A "" "TIMEOUT" "SOURCES;LINK;LABELS;MPI" ${ARGN})
  if(NOT A_LABELS)
    set(A_LABELS unit)
  endif()
  if(NOT A_TIMEOUT)
    set(A_TIMEOUT 300)
  endif()
  add_executable(${name} ${A_SOURCES})
  target_link_libraries(${name} PRIVATE ht_flags ${A_LINK} PkgConfig::CHECK)
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
  target_compile_definitions(${name} PRIVATE HT_SOURCE_DIR="${CMAKE_SOURCE_DIR}"
                                             HT_BINARY_DIR="${CMAKE_BINARY_DIR}")
  if(A_MPI)
    foreach(ranks ${A_MPI})
      add_test(NAME ${name}_n${ranks}
               COMMAND ${MPIEXEC_EXECUTABLE} -n ${ranks} --oversubscribe --allow-run-as-root
                       $<TARGET_FILE:${name}>)
      set_tests_properties(${name}_n${ranks} PROPERTIES LABELS "mpi" TIMEOUT ${A_TIMEOUT}
                           PROCESSORS 2
                           ENVIRONMENT "CK_FORK=no;OMP_NUM_THREADS=1;ASAN_OPTIONS=detect_leaks=0")
    endforeach()
  else()
    add_test(NAME ${name} COMMAND ${name})
    set_tests_properties(${name} PROPERTIES LABELS "${A_LABELS}" TIMEOUT ${A_TIMEOUT}
                         ENVIRONMENT "CK_DEFAULT_TIMEOUT=${A_TIMEOUT}")
  endif()
endfunction()
