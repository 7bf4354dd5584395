// Probe: a decode state carried token by token. The test's router decides from all token ids that a sequence has shown so far,
// so it must keep a running sum in RouteState; the attention keeps keys and values. Every split of the text into calls gives
// the logits of the full forward pass.
#include "core/config.h"
#include "core/model/model.h"
#include "core/select.h"

#include <ATen/ATen.h>
#include <catch2/catch_test_macros.hpp>

using namespace moelab;

namespace {

class RunningSumRouter : public Router {
 public:
  explicit RunningSumRouter(const RouterSpec& spec)
      : Router(spec),
        weight_ED_(
            add_parameter("weight", normal_tensor(spec.init.with("weight"), {spec.max_experts, spec.width}, 0.5, spec.dtype))) {}

  RouteOutput route(const RouteInput& in, RouteState& state) const override {
    Tensor& sum_B = state.kept["sum"];
    if (!sum_B.defined()) sum_B = at::zeros({in.sequences}, at::kLong);
    Tensor choice_T1 = at::empty({in.rows(), 1}, at::kLong);
    for (int64_t t = 0; t < in.rows(); ++t) {  // rows of a sequence come in order
      sum_B[in.sequence_T[t]] += in.token_ids_T[t];
      choice_T1[t][0] = sum_B[in.sequence_T[t]].remainder(spec_.experts);
    }
    const Tensor probs_TE = router_logits(in.x_TD, weight_ED_).softmax(1);
    const Tensor gate_T1 = gather_choices(probs_TE, choice_T1);
    return finish_sparse(in, spec_, {choice_T1, gate_T1, gate_T1.detach(), {}}, {});
  }

 private:
  Tensor weight_ED_;
};

const Registration<RouterEntry> registration_running_sum{{
    .name = "test_running_sum",
    .facts = {.needs_token_ids = true, .fixed_k = 1},
    .make = [](RouterSpec spec) -> std::unique_ptr<Router> { return std::make_unique<RunningSumRouter>(spec); },
}};

double decode_error(const Tensor& a, const Tensor& b) { return ((a - b).abs().max() / b.abs().max()).item<double>(); }

}  // namespace

TEST_CASE("decoding with carried router state and key-value caches equals the full forward") {
  const auto model = make_model({parse_config(R"(
[model]
layers = 3
width = 8
heads = 2
context = 12
moe_layers = "0,2"
dtype = "float64"
[moe]
experts = 3
[moe.router]
name = "test_running_sum"
)", "probe.toml"), {DataKind::kTokens, /*classes=*/7}, /*seed=*/1});
  at::manual_seed(2);
  const Tensor tokens_BL = at::randint(7, {2, 12}, at::kLong);
  Batch batch;
  batch.tokens_BL = tokens_BL;
  StepContext context;
  context.mode = Mode::kEval;
  context.seed = 1;
  const Tensor full_BLV = model->forward(batch, context).logits_BLV.detach();
  for (const std::vector<int64_t>& calls :
       {std::vector<int64_t>{1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}, {5, 1, 1, 1, 1, 1, 1, 1}, {3, 4, 5}}) {
    DecodeState state;
    for (const int64_t length : calls) {
      const Tensor logits_BV = model->decode(tokens_BL.narrow(1, state.position, length), state);
      CHECK(decode_error(logits_BV, full_BLV.select(1, state.position - 1)) < 1e-10);
    }
    CHECK(state.position == 12);
    CHECK(at::equal(state.routers.at(1).kept.at("sum"), tokens_BL.sum(1)));
  }
}
