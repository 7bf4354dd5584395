// The files of `moelab route`: IN with every check that needs no layer, OUT whole or not at all.
#pragma once

#include "core/tensor.h"

#include <map>
#include <set>
#include <string>
#include <vector>

namespace moelab {

// One size of an accepted shape: a number, or the name of a size that IN decides ("T", "D").
using ShapeWords = std::vector<std::string>;

// float32 or float64 | int64 | bool or uint8 | int64, each of IN's rows once
enum class TensorKind { kFloat, kIndex, kFlag, kPermutation };

// A tensor that IN may hold beside the layer's own. Several shapes are alternatives.
struct AcceptedTensor {
  std::string name;
  std::vector<ShapeWords> shapes;
  TensorKind kind = TensorKind::kFloat;
  std::string meaning = {};
};

class RouteFile {
 public:
  // Reads IN and checks `x`; the sizes T and D are known from then on.
  explicit RouteFile(const std::string& path);

  const std::string& path() const { return path_; }
  const Tensor& x() const { return tensors_.at("x"); }
  int64_t rows() const { return x().size(0); }
  int64_t width() const { return x().size(1); }

  bool has(const std::string& name) const { return tensors_.count(name) != 0; }
  Tensor find(const std::string& name) const;  // undefined where absent

  void set_size(const std::string& word, int64_t size) { sizes_[word] = size; }

  // Refuses names outside `known`, with the nearest of them.
  void refuse_unknown(const std::set<std::string>& known) const;

  // Checks shape and type; returns the shape that fits, or nothing where IN lacks the tensor.
  ShapeWords check(const AcceptedTensor& accepted) const;

  // Exit 2, naming the tensor, what it is and what it should be.
  [[noreturn]] void fail_shape(const std::string& name, const std::string& wanted) const;
  [[noreturn]] void fail_dtype(const std::string& name, const std::string& wanted) const;

 private:
  std::vector<int64_t> numbers(const ShapeWords& shape) const;

  std::string path_;
  std::map<std::string, Tensor> tensors_;
  std::map<std::string, int64_t> sizes_;
};

bool is_size_number(const std::string& word);                 // a number, not the name of a size
std::string dtype_word(at::ScalarType type);                  // "float32"
std::string shape_text(const std::vector<int64_t>& shape);    // "[4, 3]"

// Through a temporary file beside `path`, removed when anything fails.
void write_route_file(const std::string& path, const std::vector<NamedTensor>& tensors);

}  // namespace moelab
