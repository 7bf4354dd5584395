# Flags that every target of ours shares (objects must agree on them), and the one way to make a group of objects.
add_library(moelab_flags INTERFACE)
target_include_directories(moelab_flags INTERFACE $<BUILD_INTERFACE:${CMAKE_CURRENT_SOURCE_DIR}>)
target_compile_features(moelab_flags INTERFACE cxx_std_20)
target_link_libraries(moelab_flags INTERFACE moelab_torch::torch)

add_library(moelab_private_flags INTERFACE)
target_compile_definitions(moelab_private_flags INTERFACE AT_PER_OPERATOR_HEADERS SPDLOG_FMT_EXTERNAL
  MOELAB_VERSION="${PROJECT_VERSION}")
target_compile_options(moelab_private_flags INTERFACE -Wall -Wextra -Wpedantic -Wshadow $<$<BOOL:${MOELAB_WERROR}>:-Werror>)
if(MOELAB_SANITIZE)
  target_compile_options(moelab_private_flags INTERFACE -fsanitize=${MOELAB_SANITIZE} -fno-omit-frame-pointer)
  target_link_options(moelab_flags INTERFACE -fsanitize=${MOELAB_SANITIZE})
endif()

find_program(MOLD_PROGRAM mold)
if(MOLD_PROGRAM)
  target_link_options(moelab_flags INTERFACE $<BUILD_INTERFACE:-fuse-ld=mold>)
endif()

# ccache keys hold paths relative to the checkout, so that two clones share one cache; what a precompiled header defines is told by
# the headers that it is made of.
find_program(CCACHE_PROGRAM ccache)
if(CCACHE_PROGRAM)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${CMAKE_COMMAND} -E env CCACHE_BASEDIR=${CMAKE_CURRENT_SOURCE_DIR} CCACHE_NOHASHDIR=1
      CCACHE_SLOPPINESS=pch_defines,time_macros ${CCACHE_PROGRAM})
endif()

# LibTorch ships newer headers of fmt beside its own. They come first on the path of includes and name symbols that
# libfmt and libspdlog do not have, so the headers of the fmt that we link go before them.
function(moelab_prefer_own_fmt)
  get_target_property(fmt_includes fmt::fmt INTERFACE_INCLUDE_DIRECTORIES)
  find_path(FMT_INCLUDE_DIR fmt/format.h HINTS ${fmt_includes} REQUIRED)
  set(first ${PROJECT_BINARY_DIR}/include_first)
  file(MAKE_DIRECTORY ${first})
  file(CREATE_LINK ${FMT_INCLUDE_DIR}/fmt ${first}/fmt SYMBOLIC)
  target_include_directories(moelab_flags SYSTEM BEFORE INTERFACE $<BUILD_INTERFACE:${first}>)
endfunction()

function(moelab_objects name)
  set(sources ${ARGN})
  if(NOT sources)
    set(sources ${PROJECT_SOURCE_DIR}/cmake/empty.cpp)
  endif()
  add_library(${name} OBJECT ${sources})
  target_link_libraries(${name} PRIVATE moelab_flags moelab_private_flags fmt::fmt spdlog::spdlog
    nlohmann_json::nlohmann_json tomlplusplus::tomlplusplus ZLIB::ZLIB)
  set_target_properties(${name} PROPERTIES UNITY_BUILD ${MOELAB_UNITY} UNITY_BUILD_BATCH_SIZE 16)
endfunction()
