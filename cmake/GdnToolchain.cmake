# SPDX-License-Identifier: Apache-2.0
# Language level, warnings, and the tools that make building faster where they are present.
if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "" FORCE)
endif()
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
add_compile_options(-Wall -Wextra -Wno-sign-compare -Wno-unused-parameter -fno-math-errno)

find_program(GDN_CCACHE ccache)
if(GDN_CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  # Paths below the clone are relative in the cache, so that clones share it; the sloppiness allows precompiled headers.
  set(CMAKE_CXX_COMPILER_LAUNCHER /usr/bin/env CCACHE_BASEDIR=${CMAKE_CURRENT_SOURCE_DIR} CCACHE_NOHASHDIR=1
    CCACHE_SLOPPINESS=pch_defines,time_macros,include_file_mtime,include_file_ctime ${GDN_CCACHE})
endif()
find_program(GDN_MOLD mold)
if(GDN_MOLD)
  add_link_options(-fuse-ld=mold)
endif()
if(GDN_SANITIZE)
  add_compile_options(-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1)
  add_link_options(-fsanitize=address,undefined)
endif()
