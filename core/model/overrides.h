// Which blocks a word or a list names, and what `[[layer]]` tables change in them.
#pragma once

#include "core/config.h"

#include <string>
#include <vector>

namespace moelab {

// One flag per block for "all", "none", "odd", "even", "first", "last" or "1,3". `table` and `key` give complaints a place.
std::vector<bool> named_blocks(const Table& table, const std::string& key, const std::string& words, int64_t layers);

// The tables that each block reads: `root` with every [[layer]] that names the block laid on top, in their order.
std::vector<Table> tables_of_blocks(const Table& root, const std::vector<bool>& has_moe);

}  // namespace moelab
