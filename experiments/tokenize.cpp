#include "experiments/tokenize.h"

#include "core/error.h"
#include "core/io/files.h"
#include "experiments/experiment.h"
#include "experiments/plugins.h"

#include <fmt/format.h>

#include <filesystem>

namespace moelab {
namespace {

// The machine is little-endian: datasets/tokens.cpp asserts it.
std::string_view raw_tokens(const std::vector<uint16_t>& tokens) {
  return {reinterpret_cast<const char*>(tokens.data()), tokens.size() * sizeof(uint16_t)};
}

void require_absent(const std::string& folder) {
  for (const char* name : {"train.bin", "validation.bin", "tokenizer.model"})
    if (std::filesystem::exists(folder + "/" + name))
      usage_error(fmt::format("{}/{} exists already; choose another folder with --out", folder, name));
}

double validation_bytes_per_token(const Dataset& data) {
  const Tensor targets_BL = data.eval_batch(0, data.eval_sequences()).targets_BL;
  return data.bytes_of(targets_BL) / static_cast<double>(targets_BL.ge(0).sum().item<int64_t>());
}

}  // namespace

Json tokenize(const Table& root, const std::string& folder) {
  check_top_level(root);
  load_plugins(root);
  const std::shared_ptr<const Dataset> data = read_dataset(root, model_context(root));
  const std::vector<uint16_t> train = data->train_tokens(), validation = data->validation_tokens();
  if (train.empty()) root.child("data").fail("name", "these data have no end that a file could hold; name a text");
  require_absent(folder);
  make_folders(folder);
  write_file_atomically(folder + "/train.bin", raw_tokens(train));
  write_file_atomically(folder + "/validation.bin", raw_tokens(validation));
  if (!data->tokenizer().empty()) write_file_atomically(folder + "/tokenizer.model", data->tokenizer());
  Json table{{"name", "tokens"}, {"path", folder + "/train.bin"}, {"validation_path", folder + "/validation.bin"},
             {"vocabulary", data->vocabulary()}, {"start_token", data->eval_batch(0, 1).tokens_BL[0][0].item<int64_t>()}};
  if (data->is_text()) table["bytes_per_token"] = validation_bytes_per_token(*data);
  return table;
}

std::string tokenize_text(const Json& table) {
  std::string text = "[data]\n";
  for (const auto& [key, value] : table.items()) text += fmt::format("{} = {}\n", key, value.dump());
  return text;
}

}  // namespace moelab
