# `cmake --install` and find_package(moelab): headers of core/, the shared library, the program.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)
install(TARGETS moelab_library moelab_flags EXPORT moelabTargets LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(TARGETS moelab_pieces LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(TARGETS moelab RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
install(DIRECTORY core trainers DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/moelab FILES_MATCHING PATTERN "*.h")
target_compile_definitions(moelab_flags INTERFACE $<INSTALL_INTERFACE:MOELAB_VERSION="${PROJECT_VERSION}">)  # for core/plugin.h
target_include_directories(moelab_flags INTERFACE $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}/moelab>)
set(moelab_cmake_dir ${CMAKE_INSTALL_LIBDIR}/cmake/moelab)
install(EXPORT moelabTargets NAMESPACE moelab:: DESTINATION ${moelab_cmake_dir})
configure_package_config_file(cmake/moelabConfig.cmake.in moelabConfig.cmake INSTALL_DESTINATION ${moelab_cmake_dir})
write_basic_package_version_file(moelabConfigVersion.cmake COMPATIBILITY ExactVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/moelabConfig.cmake ${CMAKE_CURRENT_BINARY_DIR}/moelabConfigVersion.cmake
        cmake/MoelabTorch.cmake DESTINATION ${moelab_cmake_dir})
