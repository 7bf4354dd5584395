// Training steps of a decoder that is little but attention: heads that are experts beside dense attention of as many heads of the
// same size. MoA shares keys and values among its heads and the dense layer does not, so both counts of FLOPs are printed.
#include "stepper.h"

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

}  // namespace

int main(int argc, char** argv) {
  Suite suite;
  add_steps(suite, "attention", "dense", kModel, {});
  add_steps(suite, "attention", "moa", kModel, routed("moa", 8, 0));
  add_steps(suite, "attention", "moh", kModel, routed("moh", 8, 2));
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
  return suite.run(argc, argv);
}
