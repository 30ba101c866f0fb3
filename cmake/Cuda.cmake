# CUDA: the compiler, its architectures, and the twins of our libraries that run kernels on the host.
#
# HT_CUDA_FOUND  kernels are compiled by nvcc; tables get their second row (HT_WITH_CUDA)
# HT_EMU         twins exist: ht_emu_base for ht_base, and so on (tests/emu/cuda_emu.h)

set(HT_CUDA_FOUND FALSE)
# AUTO: not in sanitized builds, which are about host code; the emulation covers the kernels
if(HT_WITH_CUDA AND NOT (HT_WITH_CUDA STREQUAL "AUTO" AND HT_SANITIZE))
  if(NOT HT_NVCC AND DEFINED ENV{CUDACXX})
    set(HT_NVCC $ENV{CUDACXX} CACHE FILEPATH "CUDA compiler")
  endif()
  find_program(HT_NVCC nvcc HINTS ENV CUDA_PATH /usr/local/cuda PATH_SUFFIXES bin)
  set(nvcc_version 0)
  if(HT_NVCC)
    execute_process(COMMAND ${HT_NVCC} --version OUTPUT_VARIABLE nvcc_text ERROR_QUIET)
    string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" nvcc_version "${nvcc_text}")
    set(nvcc_version ${CMAKE_MATCH_1})
  endif()
  if(nvcc_version VERSION_GREATER_EQUAL 12.4)
    set(HT_CUDA_FOUND TRUE)
    set(CMAKE_CUDA_COMPILER ${HT_NVCC})
  elseif(NOT HT_WITH_CUDA STREQUAL "AUTO")
    message(FATAL_ERROR "HT_WITH_CUDA is ON; nvcc 12.4 or newer is needed and ${HT_NVCC} is ${nvcc_version}: "
                        "put it on the PATH or set CUDACXX")
  endif()
endif()

if(HT_CUDA_FOUND)
  # sm_80: A100, and as PTX every other GPU since; sm_90a: H100; the newest that this nvcc knows.
  if(NOT HT_CUDA_ARCHITECTURES)
    execute_process(COMMAND ${HT_NVCC} --list-gpu-arch OUTPUT_VARIABLE archs)
    string(REGEX MATCHALL "[0-9]+" archs "${archs}")
    list(SORT archs COMPARE NATURAL)
    list(GET archs -1 newest)
    set(HT_CUDA_ARCHITECTURES "80;90a-real;${newest}-real")
  endif()
  set(CMAKE_CUDA_ARCHITECTURES ${HT_CUDA_ARCHITECTURES})
  set(CMAKE_CUDA_STANDARD 17)
  set(CMAKE_CUDA_RUNTIME_LIBRARY Static) # programs start on machines without a driver
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)
  set(CMAKE_CUDA_FLAGS_RELWITHDEBINFO "-O3 -lineinfo")
  target_compile_definitions(ht_flags INTERFACE HT_WITH_CUDA)
  set(HT_PC_CUDA_LIBS "-L${CUDAToolkit_LIBRARY_DIR} -lcudart_static -lstdc++ -ldl -lrt -lpthread")
  message(STATUS "CUDA ${CMAKE_CUDA_COMPILER_VERSION} for ${CMAKE_CUDA_ARCHITECTURES}")
else()
  message(STATUS "no CUDA backend in this build (HT_WITH_CUDA=${HT_WITH_CUDA})")
endif()

function(ht_add_cuda_sources name)
  target_sources(${name} PRIVATE ${ARGN})
  # ptxas says what each kernel uses; kept beside the object for scripts/kernel_budget
  target_compile_options(${name} PRIVATE
    "$<$<COMPILE_LANGUAGE:CUDA>:-Xptxas=-v;-Xcompiler=-Wall,-Wextra,-Wno-unused-parameter>")
  set_target_properties(${name} PROPERTIES
    CUDA_COMPILER_LAUNCHER ${CMAKE_SOURCE_DIR}/cmake/ptxas_log
    CUDA_SEPARABLE_COMPILATION OFF)
  target_include_directories(${name} PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
  target_compile_definitions(${name} PRIVATE HT_CUDA_LIBRARY_DIR="${CUDAToolkit_LIBRARY_DIR}")
  target_link_libraries(${name} PUBLIC CUDA::cudart_static)
endfunction()

# ---- kernels on the host ----

set(HT_EMU FALSE)
if(HT_WITH_TESTS AND NOT HT_FUZZ AND NOT HT_SANITIZE MATCHES "thread")
  enable_language(CXX)
  set(CMAKE_CXX_STANDARD 17)
  set(CMAKE_CXX_FLAGS_RELWITHDEBINFO "-O2 -g")
  set(HT_EMU TRUE)
  set(emu ${CMAKE_SOURCE_DIR}/tests/emu)
  add_library(ht_emu_cuda STATIC EXCLUDE_FROM_ALL
    ${emu}/cuda_emu.cpp ${emu}/emu_check.cpp ${emu}/emu_mma.cpp ${emu}/emu_memory.cpp
    ${emu}/emu_hopper.cpp)
  target_link_libraries(ht_emu_cuda PUBLIC ht_flags ${CMAKE_DL_LIBS})
endif()

# The twin of ht_X is ht_emu_X: the same C files with the tables' CUDA row, the same CPU kernels, and
# the .cu files as C++. It links the twins of what ht_X links.
function(ht_add_emu_twin name)
  cmake_parse_arguments(A "" "" "SOURCES;CUDA;EMU;LINK" ${ARGN})
  string(REGEX REPLACE "^ht_" "ht_emu_" twin ${name})
  set(wrapped "")
  foreach(file ${A_CUDA})
    file(RELATIVE_PATH folder ${CMAKE_SOURCE_DIR} ${CMAKE_CURRENT_SOURCE_DIR})
    string(REGEX REPLACE "\\.cu$" ".cpp" cpp ${CMAKE_BINARY_DIR}/emu/${folder}/${file})
    file(CONFIGURE OUTPUT ${cpp} CONTENT "#include \"${CMAKE_CURRENT_SOURCE_DIR}/${file}\"\n" @ONLY)
    list(APPEND wrapped ${cpp})
  endforeach()
  if(wrapped AND NOT HT_SANITIZE) # loads and stores call the checks of tests/emu/emu_check.cpp
    set_source_files_properties(${wrapped} PROPERTIES COMPILE_OPTIONS
      "-fsanitize=thread;--param;tsan-instrument-func-entry-exit=0")
  endif()
  set(links "")
  foreach(link ${A_LINK})
    string(REGEX REPLACE "^ht_" "ht_emu_" link_twin ${link})
    if(TARGET ${link_twin})
      list(APPEND links ${link_twin})
    else()
      list(APPEND links ${link})
    endif()
  endforeach()
  add_library(${twin} STATIC EXCLUDE_FROM_ALL ${A_SOURCES} ${wrapped} ${A_EMU})
  target_compile_definitions(${twin} PUBLIC HT_WITH_CUDA HT_CUDA_EMU)
  target_link_libraries(${twin} PUBLIC ht_flags ${links} ht_emu_cuda)
endfunction()

# ht_add_emu_test(name SOURCES .. LINK ht_ops ..): a suite over the CUDA backend (tests/emu/gpu_case.h).
# Runs on the emulated device with threads in rising and in falling order (label emu), and, where
# nvcc is, on a GPU (label cuda; skipped without one). LINK names the real libraries.
function(ht_add_emu_test name)
  cmake_parse_arguments(A "" "TIMEOUT" "SOURCES;LINK" ${ARGN})
  if(NOT A_TIMEOUT)
    set(A_TIMEOUT 300)
  endif()
  set(flavours "")
  if(HT_EMU)
    list(APPEND flavours emu)
  endif()
  if(HT_CUDA_FOUND)
    list(APPEND flavours gpu)
  endif()
  foreach(flavour ${flavours})
    set(links ${A_LINK})
    if(flavour STREQUAL "emu")
      list(TRANSFORM links REPLACE "^ht_" "ht_emu_")
    endif()
    set(target ${name}_${flavour})
    add_executable(${target} ${A_SOURCES} ${CMAKE_SOURCE_DIR}/tests/emu/gpu_case.c)
    target_link_libraries(${target} PRIVATE ${links} ht_flags PkgConfig::CHECK)
    set_target_properties(${target} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
    target_compile_definitions(${target} PRIVATE HT_SOURCE_DIR="${CMAKE_SOURCE_DIR}")
    if(flavour STREQUAL "gpu")
      add_test(NAME ${target} COMMAND ${target})
      set_tests_properties(${target} PROPERTIES LABELS cuda TIMEOUT ${A_TIMEOUT}
                           SKIP_RETURN_CODE 77 RUN_SERIAL TRUE ENVIRONMENT "CK_FORK=no")
    else()
      foreach(order forward reverse)
        add_test(NAME ${target}_${order} COMMAND ${target})
        set_tests_properties(${target}_${order} PROPERTIES LABELS emu TIMEOUT ${A_TIMEOUT}
                             ENVIRONMENT "CK_FORK=no;OMP_NUM_THREADS=1;HT_EMU_ORDER=${order}")
      endforeach()
    endif()
  endforeach()
endfunction()
