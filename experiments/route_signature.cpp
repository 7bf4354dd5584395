#include "experiments/route_signature.h"

#include "experiments/route_layer.h"

#include <fmt/format.h>

namespace moelab {
namespace {

using nlohmann::json;

// Two widths: sizes that differ between layers of these depend on D.
constexpr int64_t kSmallWidth = 4;
constexpr int64_t kLargeWidth = 8;

json size_word(int64_t small, int64_t large) {
  const int64_t times = (large - small) / (kLargeWidth - kSmallWidth);
  const int64_t plus = small - times * kSmallWidth;
  if (times == 0) return small;
  const std::string product = times == 1 ? "D" : fmt::format("{}*D", times);
  return plus == 0 ? product : fmt::format("{}+{}", product, plus);
}

json words_json(const ShapeWords& shape) {
  json words = json::array();
  for (const std::string& word : shape) {
    if (is_size_number(word)) words.push_back(std::stoll(word));
    else words.push_back(word);
  }
  return words;
}

const char* dtype_text(const AcceptedTensor& input) {
  if (input.kind == TensorKind::kIndex || input.kind == TensorKind::kPermutation) return "int64";
  return input.kind == TensorKind::kFlag ? "bool or uint8" : "float32 or float64";
}

// One entry per alternative shape.
void add_input(json& list, const AcceptedTensor& input) {
  for (const ShapeWords& shape : input.shapes)
    list.push_back(
        {{"name", input.name}, {"shape", words_json(shape)}, {"dtype", dtype_text(input)}, {"meaning", input.meaning}});
}

json state_entry(const Tensor& small, const Tensor& large, const std::string& name, const char* what) {
  json shape = json::array();
  for (int64_t i = 0; i < small.dim(); ++i) shape.push_back(size_word(small.size(i), large.size(i)));
  const std::string dtype = small.is_floating_point() ? "as x" : dtype_word(small.scalar_type());
  return {{"name", name}, {"shape", shape}, {"dtype", dtype}, {"meaning", what}};
}

void add_entries(json& list, const std::vector<NamedTensor>& small, const std::vector<NamedTensor>& large, const char* what) {
  for (size_t i = 0; i < small.size(); ++i)
    list.push_back(state_entry(small[i].tensor, large[i].tensor, small[i].name, what));
}

}  // namespace

json route_signature(const Table& root) {
  const RouteLayer small = make_route_layer(root, kSmallWidth, at::kFloat);
  const RouteLayer large = make_route_layer(root, kLargeWidth, at::kFloat);
  json list = json::array();
  for (const AcceptedTensor& input : accepted_inputs(small)) add_input(list, input);
  add_entries(list, outside_names(small, small.module().parameters()), outside_names(large, large.module().parameters()),
              "parameter; default: its initial value");
  add_entries(list, small.module().buffers(), large.module().buffers(), "buffer; default: its initial value");
  return list;
}

}  // namespace moelab
