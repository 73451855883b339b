# SPDX-License-Identifier: Apache-2.0
# The libraries of the distribution behind one interface target each, however the distribution packages them.
find_package(PkgConfig QUIET)
find_package(Threads REQUIRED)
include("${CMAKE_CURRENT_LIST_DIR}/GdnHighway.cmake")

# gdn_find_header_library(target header package...): an interface target for a header-only library that some
# distributions describe by a CMake package and others only by the header itself.
function(gdn_find_header_library target header package imported)
  find_package(${package} QUIET)
  add_library(${target} INTERFACE)
  if(TARGET ${imported})
    target_link_libraries(${target} INTERFACE ${imported})
    return()
  endif()
  find_path(${target}_INCLUDE_DIR ${header})
  if(NOT ${target}_INCLUDE_DIR)
    message(FATAL_ERROR "${header} (${package}) was not found: run `make setup`, or install it by hand")
  endif()
  target_include_directories(${target} SYSTEM INTERFACE "${${target}_INCLUDE_DIR}")
endfunction()

function(gdn_find_pkg_config_library target module)
  if(NOT PKG_CONFIG_FOUND)
    message(FATAL_ERROR "pkg-config was not found: run `make setup`, or install it by hand")
  endif()
  pkg_check_modules(${target} REQUIRED QUIET IMPORTED_TARGET ${module})
  add_library(${target} ALIAS PkgConfig::${target})
endfunction()

gdn_find_header_library(gdn_json nlohmann/json.hpp nlohmann_json nlohmann_json::nlohmann_json)
gdn_find_pkg_config_library(gdn_pcre2 libpcre2-8)
gdn_find_pkg_config_library(gdn_utf8proc libutf8proc)
# Of toml++ only the headers are used, so that its shared library is not needed at run time.
find_path(GDN_TOML_INCLUDE_DIR toml++/toml.h REQUIRED)
add_library(gdn_toml INTERFACE)
target_include_directories(gdn_toml SYSTEM INTERFACE "${GDN_TOML_INCLUDE_DIR}")
# Bad input breaks some of its assertions before it is diagnosed: they must neither end the program nor, as clang's
# assumptions, be optimised on.
target_compile_definitions(gdn_toml INTERFACE TOML_HEADER_ONLY=1)
target_compile_options(gdn_toml INTERFACE  # an option: CMake drops definitions that look like a function
  "-DTOML_ASSERT(expression)=static_cast<void>(0)" $<$<CXX_COMPILER_ID:Clang>:-UNDEBUG>)
if(GDN_TORCH)
  gdn_find_header_library(gdn_cli11 CLI/CLI.hpp CLI11 CLI11::CLI11)
endif()
