// `moelab route --signature`: what IN may hold for a given experiment file, without computing anything.
#pragma once

#include "core/config.h"

#include <nlohmann/json.hpp>

namespace moelab {

// An array of {name, shape, dtype, meaning}; a size is a number, or a word: "T" rows, "D" width, "4*D".
nlohmann::json route_signature(const Table& root);

}  // namespace moelab
