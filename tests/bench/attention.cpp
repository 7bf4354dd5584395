// Training steps of a decoder that is little but attention: heads that are experts beside dense attention of as many heads of the
// same size. MoA shares keys and values among its heads and the dense layer does not, so both counts of FLOPs are printed.
//
//   moh_chosen  moh where chosen heads alone map their queries and outputs
//   moh_floor   the dense layer's step, and in each layer what moh must have beside it, chosen heads or not: keys and values of
//               the eight other heads, and the library's attention over them, which takes a head's queries for all rows or none
#include "stepper.h"

#include <ATen/ops/linear.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/scaled_dot_product_attention.h>

#include <fmt/format.h>

using namespace moelab;
using namespace moelab::bench;

namespace {

const std::string kModel = R"(
seed = 1
[model]
layers = 4
width = 256
heads = 8
context = 256
moe_layers = "none"
dense_width = 8
[data]
name = "markov"
states = 16
validation_documents = 4
[train]
steps = 1
batch = 4
)";

// `chosen` of 16 heads of 32: with 8, the dense layer's number.
std::vector<std::string> routed(const std::string& style, int chosen, int shared) {
  std::vector<std::string> set{fmt::format("attention.experts={}", 16 - shared),
                               fmt::format("attention.router.k={}", chosen - shared), "attention.expert.style=" + style,
                               "attention.expert.head_size=32"};
  if (style == "moh") set.push_back(fmt::format("attention.expert.shared_heads={}", shared));
  return set;
}

constexpr int64_t kLayers = 4, kSequences = 4, kContext = 256, kWidth = 256, kHeads = 8;

// Forward and backward, with the gradient of one more summand of the output.
class OtherHeads {
 public:
  void once() const {
    const auto heads = [](const Tensor& rows_TD) {
      return rows_TD.view({kSequences, kContext, kHeads, kWidth / kHeads}).transpose(1, 2);
    };
    for (int64_t layer = 0; layer < kLayers; ++layer) {
      const Tensor k = heads(at::linear(x_TD_, w_k_)), v = heads(at::linear(x_TD_, w_v_));
      const Tensor mixed = at::scaled_dot_product_attention(heads(q_TD_), k, v, {}, 0, /*is_causal=*/true);
      mixed.backward(at::ones_like(mixed));
      for (const Tensor& leaf : {x_TD_, q_TD_, w_k_, w_v_}) leaf.mutable_grad() = Tensor();
    }
  }

 private:
  static Tensor leaf(int64_t rows) { return at::randn({rows, kWidth}).requires_grad_(); }
  Tensor x_TD_ = leaf(kSequences * kContext), q_TD_ = leaf(kSequences * kContext), w_k_ = leaf(kWidth), w_v_ = leaf(kWidth);
};

void add_floor_of_moh(Suite& suite) {
  const auto dense = std::make_shared<Stepper>(kModel, std::vector<std::string>{});
  const auto others = std::make_shared<OtherHeads>();
  for (const int threads : {1, 2}) {
    const auto line = [&](const char* name) { return fmt::format("attention/{}/threads{}", name, threads); };
    suite.add(Line{.name = line("moh_floor"), .work = [=] { dense->once(), others->once(); }, .threads = threads});
    suite.add(RatioRow{fmt::format("T1024 d256, {} thread(s): dense attention over the least of moh on the library's attention",
                                   threads), line("dense"), line("moh_floor"), 0, true});
    suite.add(RatioRow{fmt::format("T1024 d256, {} thread(s): dense attention over moh by chosen heads", threads),
                       line("dense"), line("moh_chosen"), 0, true});
  }
}

}  // namespace

int main(int argc, char** argv) {
  Suite suite;
  add_steps(suite, "attention", "dense", kModel, {});
  add_steps(suite, "attention", "moa", kModel, routed("moa", 8, 0));
  add_steps(suite, "attention", "moh", kModel, routed("moh", 8, 2));
  std::vector<std::string> chosen = routed("moh", 8, 2);
  chosen.push_back("attention.execution=grouped");
  add_steps(suite, "attention", "moh_chosen", kModel, chosen);
  add_steps(suite, "attention", "switchhead", kModel,
            {"attention.experts=4", "attention.router.k=2", "attention.expert.style=switchhead", "attention.expert.heads=4",
             "attention.expert.head_size=32"});
  for (const int threads : {1, 2})
    for (const char* style : {"moa", "moh", "switchhead"}) {
      const auto line = [&](const char* name) { return fmt::format("attention/{}/threads{}", name, threads); };
      const bool same_heads = style != std::string("switchhead");
      suite.add(RatioRow{fmt::format("T1024 d256, {} thread(s): dense attention of {} over {}", threads,
                                     same_heads ? "the same 8 active heads" : "8 heads (4 heads, 2 of 4 experts a side)", style),
                         line("dense"), line(style), same_heads ? 0.75 : 0, true});
    }
  add_floor_of_moh(suite);
  return suite.run(argc, argv);
}
