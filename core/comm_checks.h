// What every backend demands of a call. Each function returns what is wrong, or "".
#pragma once

#include "core/comm.h"

#include <string>

namespace moelab {

std::string all_reduce_problem(const Tensor& tensor, Reduce op);
std::string broadcast_problem(const Tensor& tensor, int root, int size);
std::string reduce_scatter_problem(const Tensor& input, int size);
std::string all_gather_problem(const Tensor& input);
std::string all_to_all_problem(const Tensor& input, const std::vector<int64_t>& send, const std::vector<int64_t>& receive,
                               int size);

}  // namespace moelab
