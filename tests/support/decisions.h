// Routing decisions made by hand, for tests of what reads them.
#pragma once

#include "core/loss.h"
#include "tests/support/compare.h"

#include <memory>
#include <string>
#include <vector>

namespace moelab::test {

using Rows = std::vector<std::vector<double>>;

// Stands where a Router is asked for; it decides nothing.
class BareRouter : public Router {
 public:
  BareRouter() : Router(RouterSpec{}) {}
  RouteOutput route(const RouteInput&, RouteState&) const override { return {}; }
};

Tensor tensor_of(const Rows& rows);                                  // float64 [T,n]
Tensor choices_of(const std::vector<std::vector<int64_t>>& choices);  // int64 [T,K]
Rows rows_of(const Tensor& tensor);

// Training rows of the given sequences (all of sequence 0 when empty), x of width 1.
RouteInput input_of(int64_t rows, std::vector<int64_t> sequence = {}, Mode mode = Mode::kTrain);

// Every choice is kept; gates as given, on the graph.
RouteOutput decision_of(const Tensor& choice_TK, const Tensor& gate_TK, Scores scores);

// Noisy top-k gating: noisy = clean + std · draw, the k largest noisy logits, gates their softmax, loss_TE = softmax(clean).
// Everything but the choice is on the graph of clean and std. An undefined std means no noise.
RouteOutput noisy_topk_decision(const Tensor& clean_TE, const Tensor& std_TE, const Tensor& draw_TE, int64_t k);

using Setting = std::pair<std::string, OptionValue>;

// A registered loss with options, as attached to a router of this entry.
std::unique_ptr<Loss> make_loss(const std::string& name, const std::vector<Setting>& settings = {},
                                const RouterEntry& router = {});

// value() over all rows.
Tensor value_of(const Loss& loss, const RouteInput& in, const RouteOutput& out, int64_t experts);

// (f(x + h) - f(x - h)) / 2h for every element of x.
Tensor finite_differences(const std::function<double(const Tensor&)>& f, const Tensor& x, double h = 1e-5);

}  // namespace moelab::test
