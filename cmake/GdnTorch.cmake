# SPDX-License-Identifier: Apache-2.0
# Finds LibTorch in the Python environment (.venv by default, else GDN_PYTHON) and wraps it in the target gdn_torch.
if(NOT GDN_PYTHON)
  if(SKBUILD)  # pip builds with the torch of its own environment
    set(GDN_PYTHON "${Python_EXECUTABLE}")
  elseif(EXISTS "${CMAKE_CURRENT_SOURCE_DIR}/.venv/bin/python")
    set(GDN_PYTHON "${CMAKE_CURRENT_SOURCE_DIR}/.venv/bin/python")
  else()
    set(GDN_PYTHON python3)
  endif()
endif()
if(NOT Torch_DIR)
  execute_process(
    COMMAND "${GDN_PYTHON}" -c "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
    OUTPUT_VARIABLE GDN_TORCH_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE GDN_TORCH_FAILED ERROR_QUIET)
  if(GDN_TORCH_FAILED)
    message(FATAL_ERROR "torch was not found by ${GDN_PYTHON}: run `make setup` first, or configure with -DGDN_TORCH=OFF")
  endif()
  set(Torch_DIR "${GDN_TORCH_ROOT}/share/cmake/Torch" CACHE PATH "LibTorch of the Python wheel")
endif()
# The CPU wheel's own package warns about libraries it does without.
set(CMAKE_MESSAGE_LOG_LEVEL ERROR)
find_package(Torch REQUIRED CONFIG)
unset(CMAKE_MESSAGE_LOG_LEVEL)
add_library(gdn_torch INTERFACE)
target_link_libraries(gdn_torch INTERFACE ${TORCH_LIBRARIES})
separate_arguments(GDN_TORCH_FLAGS UNIX_COMMAND "${TORCH_CXX_FLAGS}")
target_compile_options(gdn_torch INTERFACE ${GDN_TORCH_FLAGS})
target_compile_definitions(gdn_torch INTERFACE USE_DISTRIBUTED)
# Torch's headers are not ours to warn about.
target_include_directories(gdn_torch SYSTEM INTERFACE ${TORCH_INCLUDE_DIRS})

# at::parallel_for is a header over OpenMP. It must run on the OpenMP runtime that torch itself has loaded, or
# torch.set_num_threads would rule another pool than ours: link torch's own copy where the wheel brings one.
file(GLOB GDN_TORCH_GOMP ${TORCH_INSTALL_PREFIX}/lib/libgomp*.so* ${TORCH_INSTALL_PREFIX}/../torch.libs/libgomp*.so*)
if(GDN_TORCH_GOMP)
  list(GET GDN_TORCH_GOMP 0 GDN_TORCH_OPENMP)
else()
  find_package(OpenMP REQUIRED)
  set(GDN_TORCH_OPENMP ${OpenMP_CXX_LIBRARIES})
endif()
set_source_files_properties("${PROJECT_SOURCE_DIR}/gdn/ops/common.cpp" PROPERTIES
  COMPILE_OPTIONS -fopenmp SKIP_PRECOMPILE_HEADERS ON)

# gdn_precompile_torch(target [header...]): cuts the time of a source on torch to about a third.
function(gdn_precompile_torch target)
  if(NOT GDN_PCH)
    return()
  endif()
  target_precompile_headers(${target} PRIVATE "${PROJECT_SOURCE_DIR}/cmake/torch_pch.h" ${ARGN})
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    target_compile_options(${target} PRIVATE -fpch-preprocess)  # for ccache
  endif()
endfunction()
