// The layers of a model as plain loops in double, for references that share no code with it.
#pragma once

#include "core/model/model.h"

#include <string>
#include <vector>

namespace moelab::test {

using Vector = std::vector<double>;
using Matrix = std::vector<Vector>;

Vector vector_of(const Tensor& t);  // float64, flattened
void add_to(Vector& x, const Vector& y);
Vector times(const Tensor& weight_OI, const Vector& x);
Vector normed(const Vector& x, const Tensor& weight_D);  // root mean square

// Attention of all rows of a sequence under `block` + "attention."; causal attention has rotary positions, the other has none.
Matrix plain_attention(const Model& model, const std::string& block, const Matrix& x, size_t heads, bool causal);

Vector swiglu(const Model& model, const std::string& bank, int64_t expert, const Vector& x);

// Softmax over all experts, the two best, gates as they are, of SwiGLU experts below `moe`.
Vector softmax_top2(const Model& model, const std::string& moe, const Vector& x);

}  // namespace moelab::test
