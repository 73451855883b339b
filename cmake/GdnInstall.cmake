# SPDX-License-Identifier: Apache-2.0
# cmake --install: headers, libraries, the program, the CMake package gdn (gdn::kernels, gdn::gdn) and gdn.pc.
include(CMakePackageConfigHelpers)
set(gdn_package_dir "${CMAKE_INSTALL_LIBDIR}/cmake/gdn")

install(TARGETS gdn_kernels EXPORT gdnKernelsTargets
  ARCHIVE DESTINATION "${CMAKE_INSTALL_LIBDIR}" FILE_SET HEADERS DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
install(EXPORT gdnKernelsTargets NAMESPACE gdn:: DESTINATION "${gdn_package_dir}")

# A wheel holds the library beside the Python package, and finds torch beside that.
if(SKBUILD)
  set_property(TARGET gdn PROPERTY INSTALL_RPATH "$ORIGIN/../torch/lib")
  install(TARGETS gdn LIBRARY DESTINATION gdn COMPONENT python)
  return()
endif()

set(GDN_TORCH_VERSION "")
if(TARGET gdn)
  set(GDN_TORCH_VERSION "${Torch_VERSION}")
  # The installed tree may move; torch is found where it was at build time, else by LD_LIBRARY_PATH.
  set_property(TARGET gdn PROPERTY INSTALL_RPATH "$ORIGIN" "${TORCH_INSTALL_PREFIX}/lib")
  set_property(TARGET gdn_program PROPERTY INSTALL_RPATH "$ORIGIN/../${CMAKE_INSTALL_LIBDIR}" "${TORCH_INSTALL_PREFIX}/lib")
  install(TARGETS gdn EXPORT gdnTorchTargets
    LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}" FILE_SET HEADERS DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
  install(EXPORT gdnTorchTargets NAMESPACE gdn:: DESTINATION "${gdn_package_dir}")
  install(TARGETS gdn_program RUNTIME DESTINATION "${CMAKE_INSTALL_BINDIR}")
endif()

configure_package_config_file("${CMAKE_CURRENT_LIST_DIR}/gdnConfig.cmake.in" "${CMAKE_CURRENT_BINARY_DIR}/gdnConfig.cmake"
  INSTALL_DESTINATION "${gdn_package_dir}" NO_SET_AND_CHECK_MACRO)
# While the version is 0.x, each minor version may change the interface.
write_basic_package_version_file("${CMAKE_CURRENT_BINARY_DIR}/gdnConfigVersion.cmake" COMPATIBILITY SameMinorVersion)
install(FILES "${CMAKE_CURRENT_BINARY_DIR}/gdnConfig.cmake" "${CMAKE_CURRENT_BINARY_DIR}/gdnConfigVersion.cmake"
  "${CMAKE_CURRENT_LIST_DIR}/GdnHighway.cmake" DESTINATION "${gdn_package_dir}")

# pkg-config describes the torch-free part only: torch's flags belong to no .pc file.
file(RELATIVE_PATH gdn_prefix_from_pc "${CMAKE_INSTALL_PREFIX}/${CMAKE_INSTALL_LIBDIR}/pkgconfig" "${CMAKE_INSTALL_PREFIX}")
configure_file("${CMAKE_CURRENT_LIST_DIR}/gdn.pc.in" "${CMAKE_CURRENT_BINARY_DIR}/gdn.pc" @ONLY)
install(FILES "${CMAKE_CURRENT_BINARY_DIR}/gdn.pc" DESTINATION "${CMAKE_INSTALL_LIBDIR}/pkgconfig")
