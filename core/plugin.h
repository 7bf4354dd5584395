// For routers, experts and losses outside the tree: a shared library says once, in any of its files,
//
//   #include <core/plugin.h>
//   MOELAB_PLUGIN
//
// and is named in `plugins = "mine.so"` or `--plugin mine.so`. The macro leaves one line of data in the file, which moelab
// reads before loading it: registrations run while a library is being loaded, too late to ask it how it was built.
#pragma once

#include <torch/headeronly/version.h>

#define MOELAB_TEXT_OF_VALUE(value) #value
#define MOELAB_TEXT_OF(macro) MOELAB_TEXT_OF_VALUE(macro)

#define MOELAB_PLUGIN_MARK "moelab-plugin{"
#define MOELAB_PLUGIN_FIELDS(version)                                        \
  "moelab " version ";LibTorch " TORCH_VERSION ";compiler " __VERSION__ ";C++ " \
  MOELAB_TEXT_OF(__cplusplus)

#define MOELAB_PLUGIN                                     \
  extern "C" const char moelab_plugin_line[];             \
  extern "C" __attribute__((visibility("default"), used)) \
  const char moelab_plugin_line[] = MOELAB_PLUGIN_MARK MOELAB_PLUGIN_FIELDS(MOELAB_VERSION) "}";
