# SPDX-License-Identifier: Apache-2.0
# Installs a build into a folder of its own, moves that folder (so that nothing can rely on where it was installed),
# builds the consumer against it and runs it.
function(must_run)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE failed OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(failed)
    list(JOIN ARGN " " command)
    message(FATAL_ERROR "${command}\nfailed (${failed}):\n${output}")
  endif()
endfunction()

set(work "${BUILD_DIR}/consumer")
file(REMOVE_RECURSE "${work}")
must_run(${CMAKE_COMMAND} --install "${BUILD_DIR}" --prefix "${work}/staged")
file(RENAME "${work}/staged" "${work}/prefix")

set(flags "")
if(SANITIZE)
  set(flags "-fsanitize=address,undefined")
endif()
set(with_torch OFF)
if(TORCH_DIR)
  set(with_torch ON)
endif()
string(REGEX MATCH "^[0-9]+\\.[0-9]+" wanted "${VERSION}")
must_run(${CMAKE_COMMAND} -S "${SOURCE_DIR}" -B "${work}/build" -G "${GENERATOR}"
  -DCMAKE_CXX_COMPILER=${CXX} -DCMAKE_CXX_FLAGS=${flags} -DCMAKE_PREFIX_PATH=${work}/prefix
  -DTorch_DIR=${TORCH_DIR} -DWITH_TORCH=${with_torch} -DWANTED_VERSION=${wanted})
must_run(${CMAKE_COMMAND} --build "${work}/build")
must_run("${work}/build/use_kernels")
if(with_torch)
  must_run("${work}/build/use_ops")
  must_run("${work}/prefix/bin/gdn" --version)
endif()

# The torch-free part by pkg-config.
file(GLOB pc_files "${work}/prefix/lib*/pkgconfig" "${work}/prefix/lib*/*/pkgconfig")
set(ENV{PKG_CONFIG_PATH} "${pc_files}:$ENV{PKG_CONFIG_PATH}")
execute_process(COMMAND pkg-config --cflags --libs gdn OUTPUT_VARIABLE pc_flags OUTPUT_STRIP_TRAILING_WHITESPACE
  COMMAND_ERROR_IS_FATAL ANY)
separate_arguments(pc_flags UNIX_COMMAND "${pc_flags}")
must_run(${CXX} -std=c++20 ${flags} "${SOURCE_DIR}/use_kernels.cpp" -o "${work}/use_kernels_pc" ${pc_flags})
must_run("${work}/use_kernels_pc")

# Another minor version of 0.x is refused.
execute_process(COMMAND ${CMAKE_COMMAND} -S "${SOURCE_DIR}" -B "${work}/refused" -G "${GENERATOR}"
  -DCMAKE_CXX_COMPILER=${CXX} -DCMAKE_PREFIX_PATH=${work}/prefix -DWITH_TORCH=OFF -DWANTED_VERSION=0.999
  RESULT_VARIABLE refused OUTPUT_QUIET ERROR_QUIET)
if(NOT refused)
  message(FATAL_ERROR "find_package(gdn 0.999) was accepted by version ${VERSION}")
endif()
