#include "core/model/overrides.h"

#include "core/error.h"
#include "core/model/settings.h"
#include "core/moe_layer.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>

namespace moelab {
namespace {

std::vector<std::string> override_tables() {
  std::vector<std::string> tables = layer_tables();
  tables.emplace_back("loss");
  return tables;
}

std::vector<std::string> split_at_commas(const std::string& words) {
  std::vector<std::string> parts{""};
  for (const char c : words) {
    if (c == ',') parts.emplace_back();
    else if (c != ' ') parts.back() += c;
  }
  return parts;
}

int64_t block_number(const Table& table, const std::string& key, const std::string& word, int64_t layers) {
  int64_t block = -1;
  const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), block);
  if (error != std::errc() || end != word.data() + word.size())
    table.fail(key, fmt::format("'{}' names no blocks; write all, none, odd, even, first, last, or numbers like \"1,3\"", word));
  if (block < 0 || block >= layers)
    table.fail(key, fmt::format("there is no block {}: the model's blocks are 0 to {}", block, layers - 1));
  return block;
}

// `where` is a word or a list of integers; the reader of options knows one type per key.
std::string where_of(const Table& layer) {
  try {
    return layer.options(layer_override_options(), override_tables()).text("where");
  } catch (const Error&) {
    const OptionSpec list = option("where", std::vector<int64_t>{}, "blocks");
    const std::vector<int64_t> blocks = layer.options({list}, override_tables()).integers("where");
    return fmt::format("{}", fmt::join(blocks, ","));
  }
}

std::vector<bool> overridden_blocks(const Table& layer, const std::vector<bool>& has_moe) {
  const std::string where = where_of(layer);
  if (where.empty()) layer.fail("where", "a [[layer]] needs `where`: all, odd, even, first, last, or block numbers");
  const std::vector<bool> named = named_blocks(layer, "where", where, static_cast<int64_t>(has_moe.size()));
  bool changes_something = std::count(has_moe.begin(), has_moe.end(), true) == 0;  // the baseline without experts may keep it
  for (size_t b = 0; b < named.size(); ++b) changes_something |= named[b] && has_moe[b];
  if (!changes_something) layer.fail("where", fmt::format("'{}' names no block with experts (see moe_layers in [model])", where));
  return named;
}

}  // namespace

OptionSpecs layer_override_options() {
  return {option("where", "", "blocks that the tables below it change: all, odd, even, first, last, \"1,3\", or [1, 3]")};
}

std::vector<bool> named_blocks(const Table& table, const std::string& key, const std::string& words, int64_t layers) {
  std::vector<bool> named(layers, words == "all");
  if (words == "all" || words == "none") return named;
  if (words == "first") named.front() = true;
  else if (words == "last") named.back() = true;
  else if (words == "odd" || words == "even") for (int64_t b = words == "odd"; b < layers; b += 2) named[b] = true;
  else for (const std::string& word : split_at_commas(words)) named[block_number(table, key, word, layers)] = true;
  return named;
}

std::vector<Table> tables_of_blocks(const Table& root, const std::vector<bool>& has_moe) {
  std::vector<Table> tables(has_moe.size(), root);
  for (const Table& layer : root.array("layer")) {
    const std::vector<bool> named = overridden_blocks(layer, has_moe);
    for (size_t b = 0; b < named.size(); ++b)
      if (named[b]) tables[b] = tables[b].overlaid(layer);
  }
  return tables;
}

}  // namespace moelab
