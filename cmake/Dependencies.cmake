# What hybridtrain stands on; every package is in Debian 12 (scripts/install_packages lists them).
find_package(Threads REQUIRED)
find_package(OpenMP REQUIRED COMPONENTS C)
if(HT_KERNELS_ONLY) # a stand-in for libcheck, plain loops for oneDNN
  add_library(minicheck STATIC EXCLUDE_FROM_ALL ${CMAKE_SOURCE_DIR}/tests/emu/minicheck/minicheck.c)
  target_include_directories(minicheck PUBLIC ${CMAKE_SOURCE_DIR}/tests/emu/minicheck)
  add_library(PkgConfig::CHECK ALIAS minicheck)
  add_library(dnnl_imported INTERFACE)
  return()
endif()
find_package(PkgConfig REQUIRED)
find_package(MPI REQUIRED COMPONENTS C)

pkg_check_modules(LIBCONFIG REQUIRED IMPORTED_TARGET libconfig)
pkg_check_modules(JANSSON REQUIRED IMPORTED_TARGET jansson)
pkg_check_modules(PCRE2 REQUIRED IMPORTED_TARGET libpcre2-8)
pkg_check_modules(UTF8PROC REQUIRED IMPORTED_TARGET libutf8proc)
pkg_check_modules(XXHASH REQUIRED IMPORTED_TARGET libxxhash)
pkg_check_modules(ZSTD REQUIRED IMPORTED_TARGET libzstd)
pkg_check_modules(CHECK IMPORTED_TARGET check)
# the HTTP server and the load generator
pkg_check_modules(LIBEVENT REQUIRED IMPORTED_TARGET libevent)
pkg_check_modules(ZLIB REQUIRED IMPORTED_TARGET zlib)
# Serial driver of the Open MPI build of HDF5, one file per rank (docs/checkpoints.md).
pkg_check_modules(HDF5 REQUIRED IMPORTED_TARGET hdf5-openmpi)

# oneDNN 2.x ships no pkg-config file in Debian 12.
find_path(DNNL_INCLUDE_DIR dnnl.h REQUIRED)
find_library(DNNL_LIBRARY dnnl REQUIRED)
add_library(dnnl_imported INTERFACE)
target_include_directories(dnnl_imported SYSTEM INTERFACE ${DNNL_INCLUDE_DIR})
target_link_libraries(dnnl_imported INTERFACE ${DNNL_LIBRARY})
