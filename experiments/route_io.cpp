#include "experiments/route_io.h"

#include "core/error.h"
#include "core/io/safetensors.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <filesystem>
#include <unistd.h>

namespace moelab {
namespace {

bool kind_fits(TensorKind kind, at::ScalarType type) {
  switch (kind) {
    case TensorKind::kFloat: return type == at::kFloat || type == at::kDouble;
    case TensorKind::kIndex:
    case TensorKind::kPermutation: return type == at::kLong;
    case TensorKind::kFlag: return type == at::kBool || type == at::kByte;
  }
  return false;
}

const char* kind_text(TensorKind kind) {
  switch (kind) {
    case TensorKind::kFloat: return "float32 or float64";
    case TensorKind::kIndex:
    case TensorKind::kPermutation: return "int64";
    case TensorKind::kFlag: return "bool or uint8";
  }
  return "?";
}

}  // namespace

bool is_size_number(const std::string& word) {
  return !word.empty() && std::all_of(word.begin(), word.end(), [](unsigned char c) { return c >= '0' && c <= '9'; });
}

std::string dtype_word(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return "float32";
    case at::kDouble: return "float64";
    case at::kHalf: return "float16";
    case at::kBFloat16: return "bfloat16";
    case at::kBool: return "bool";
    case at::kByte: return "uint8";
    case at::kChar: return "int8";
    case at::kShort: return "int16";
    case at::kInt: return "int32";
    case at::kLong: return "int64";
    default: return at::toString(type);
  }
}

std::string shape_text(const std::vector<int64_t>& shape) { return fmt::format("[{}]", fmt::join(shape, ", ")); }

RouteFile::RouteFile(const std::string& path) : path_(path) {
  for (NamedTensor& named : read_safetensors(path).tensors) tensors_[named.name] = std::move(named.tensor);
  if (!has("x")) usage_error(fmt::format("'{}' lacks the tensor 'x' [T, D], the rows to route", path));
  if (!kind_fits(TensorKind::kFloat, x().scalar_type())) fail_dtype("x", kind_text(TensorKind::kFloat));
  if (x().dim() != 2 || x().size(1) == 0) fail_shape("x", "[T, D] with D > 0");
  sizes_ = {{"T", rows()}, {"D", width()}};
}

Tensor RouteFile::find(const std::string& name) const {
  const auto found = tensors_.find(name);
  return found == tensors_.end() ? Tensor() : found->second;
}

void RouteFile::refuse_unknown(const std::set<std::string>& known) const {
  for (const auto& entry : tensors_) {
    if (known.count(entry.first)) continue;
    std::string hint = did_you_mean(entry.first, known);
    if (hint.empty()) hint = fmt::format(", known are {}", fmt::join(known, ", "));
    usage_error(fmt::format("'{}': unknown tensor '{}'{}", path_, entry.first, hint));
  }
}

std::vector<int64_t> RouteFile::numbers(const ShapeWords& shape) const {
  std::vector<int64_t> sizes;
  for (const std::string& word : shape) sizes.push_back(is_size_number(word) ? std::stoll(word) : sizes_.at(word));
  return sizes;
}

ShapeWords RouteFile::check(const AcceptedTensor& accepted) const {
  if (!has(accepted.name)) return {};
  const Tensor tensor = find(accepted.name);
  std::vector<std::string> wanted;
  for (const ShapeWords& shape : accepted.shapes) {
    const std::vector<int64_t> sizes = numbers(shape);
    if (tensor.sizes() == at::IntArrayRef(sizes)) {
      if (!kind_fits(accepted.kind, tensor.scalar_type())) fail_dtype(accepted.name, kind_text(accepted.kind));
      return shape;
    }
    wanted.push_back(fmt::format("[{}] = {}", fmt::join(shape, ", "), shape_text(sizes)));
  }
  fail_shape(accepted.name, fmt::format("{}", fmt::join(wanted, " or ")));
}

void RouteFile::fail_shape(const std::string& name, const std::string& wanted) const {
  const std::string got = shape_text(find(name).sizes().vec());
  usage_error(fmt::format("'{}': tensor '{}' has shape {}, wanted {}", path_, name, got, wanted));
}

void RouteFile::fail_dtype(const std::string& name, const std::string& wanted) const {
  usage_error(fmt::format("'{}': tensor '{}' is {}, wanted {}", path_, name, dtype_word(find(name).scalar_type()), wanted));
}

void write_route_file(const std::string& path, const std::vector<NamedTensor>& tensors) {
  const std::string temporary = fmt::format("{}.{}.tmp", path, getpid());
  try {
    write_safetensors(temporary, tensors);
    rename_path(temporary, path);
  } catch (...) {
    std::error_code ignored;
    std::filesystem::remove(temporary, ignored);
    throw;
  }
}

}  // namespace moelab
