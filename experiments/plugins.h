// Shared libraries with routers, experts or losses of the user's own (core/plugin.h says how one is made).
#pragma once

#include "core/config.h"

#include <string>

namespace moelab {

// Loads one; its plugins are registered from then on. Refused, before any of its code runs, when it was built against another
// moelab, LibTorch or compiler.
void load_plugin(const std::string& path);

// Loads what the key `plugins` names. A relative path starts at the file that says it, else at the current folder.
void load_plugins(const Table& root);

}  // namespace moelab
