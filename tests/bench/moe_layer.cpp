// The MoE layer of feed-forward experts (GELU, float32, no drops) beside its peers, forward and forward with backward:
//
//   moe_layer    routing (softmax top-k) and execution
//   execute      execution alone, of a given plan
//   bare         the experts' products and activations on rows already gathered, without autograd: the bar
//   products     the same products alone, a call of the library's BLAS per expert and product, to memory that is there: nothing
//                that multiplies with the library is faster
//   dense        a dense layer of width k·f
//   plain        gather, the library's grouped product, index_add: the plain way of today
//   where        a loop over experts with where, index_select and index_add; each expert's weights are tensors of their own
//   where_stacked  the same on slices of stacked weights, whose gradients autograd makes as large as the whole stack
//   multiply_add  the multiply-adds of the experts' products and nothing else, not even memory: nothing at all is faster
//   einsum       dispatch and combine masks of capacity 1.25 (GShard's form)
//
// Experts' loads: even in expectation, `zipf` (share of expert e ∝ 1/(e+1)), `one` (one expert takes all first choices).
#include "layer_peers.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>

#include <memory>

using namespace moelab;
using namespace moelab::bench;

namespace {

// Made and checked when the first of its lines runs: a filter leaves most of them out.
class LazyFixture {
 public:
  explicit LazyFixture(Shape shape_) : shape(std::move(shape_)) {}
  const Fixture& operator*() const {
    if (made_) return *made_;
    const at::AutoGradMode graph(true);
    made_ = std::make_unique<Fixture>(shape);
    at::set_num_threads(1);
    check_answers(*made_);
    return *made_;
  }
  const Shape shape;

 private:
  mutable std::unique_ptr<Fixture> made_;
};
using FixturePtr = std::shared_ptr<const LazyFixture>;

using Output = Tensor (*)(const Fixture&);

void forward_once(const FixturePtr& f, Output output) {
  const at::NoGradGuard no_grad;
  benchmark::DoNotOptimize(output(**f));
}

void both_once(const FixturePtr& f, Output output) {
  output(**f).backward((**f).grad_y_TD);
  (**f).zero_grads();
}

void bare_once(const FixturePtr& f, bool backward) {
  const at::NoGradGuard no_grad;
  BareProducts bare;
  bare.forward(**f);
  if (backward) benchmark::DoNotOptimize(bare.backward(**f));
}

struct Lines {
  Suite& suite;
  FixturePtr f;
  int threads;
  bool keep;
  std::string pass;

  std::string name(const std::string& what) const {
    return fmt::format("{}/{}/{}{}/threads{}", what, pass, f->shape.name(), keep ? "" : "/returned", threads);
  }
  double flops() const { return (pass == "fwd" ? 1 : 3) * f->shape.flops(); }
  void add(const std::string& what, std::function<void()> work, int repetitions = 5) const {
    const Shape& s = f->shape;
    suite.add(Line{.name = name(what), .work = std::move(work), .threads = threads, .keep_memory = keep,
                   .repetitions = repetitions,
                   .counters = {{"flops", flops()}, {"bytes", s.minimal_bytes()},
                                {"rows_per_expert", static_cast<double>(s.rows_per_expert())}}});
  }
  void add_output(const std::string& what, Output output, int repetitions = 9) const {
    const FixturePtr shared = f;
    if (pass == "fwd") add(what, [=] { forward_once(shared, output); }, repetitions);
    else add(what, [=] { both_once(shared, output); }, repetitions);
  }
  void ratio(const std::string& what, const std::string& numerator, const std::string& denominator, double bar,
             bool above) const {
    const std::string where = fmt::format("{} {}, {} thread{}{}: ", f->shape.name(), pass, threads, threads == 1 ? "" : "s",
                                          keep ? "" : ", memory handed back");
    suite.add(RatioRow{where + what, name(numerator), name(denominator), bar, above});
  }
};

double bare_bar(const Shape& shape) {
  if (shape.load != "even") return 0;
  return shape.rows_per_expert() >= 128 ? 1.12 : shape.rows_per_expert() == 32 ? 1.35 : 0;
}

void add_lines(const Lines& lines) {
  const FixturePtr f = lines.f;
  const Shape& s = f->shape;
  const bool backward = lines.pass != "fwd";
  lines.add_output("moe_layer", layer_output);
  lines.add_output("execute", executed_output, 5);
  lines.add_output("dense", dense_output, 5);
  lines.add("bare", [=] { bare_once(f, backward); });
  lines.ratio("execution over bare products", "execute", "bare", bare_bar(s), false);
  const bool floor = lines.keep && s.load != "one";
  if (floor) {
    const auto products = std::make_shared<std::unique_ptr<const ProductsAlone>>();
    lines.add("products", [=] {
      if (!*products) *products = std::make_unique<const ProductsAlone>(**f);
      (*products)->once(**f, backward);
    });
    lines.ratio("the library's products alone over the layer", "products", "moe_layer", 0, false);
    lines.ratio("the plain way over the library's products alone", "plain", "products", 0, true);
  }
  lines.ratio("layer over bare products", "moe_layer", "bare", 0, false);
  lines.ratio("layer over the dense layer", "moe_layer", "dense", 0, false);
  lines.add_output("plain", plain_output);
  lines.ratio("the plain way over the layer", "plain", "moe_layer", s.experts >= 256 ? 1.4 : s.experts >= 8 ? 1.1 : 0, true);
  if (s.experts == 64 && s.load == "even" && s.k == 2 && lines.keep) {
    lines.add_output("where", where_output, 3);
    lines.add_output("where_stacked", where_stacked_output, 3);
    lines.ratio("the where loop over the layer", "where", "moe_layer", backward ? 5 : 2, true);
    lines.ratio("the where loop over the library's products alone", "where", "products", 0, true);
    lines.add("multiply_add", [flops = lines.flops()] { spend_flops(flops); }, 3);
    lines.ratio("the where loop over multiply-add alone, the most that any layer could reach", "where", "multiply_add", 0, true);
    lines.ratio("the where loop on stacked weights over the layer", "where_stacked", "moe_layer", 0, true);
  }
  if (s.experts == 8 && s.k == 2 && s.load == "even" && lines.keep) {
    lines.add_output("einsum", einsum_output, 3);
    lines.ratio("capacity einsum over the layer", "einsum", "moe_layer", 0, true);
  }
}

// x was there before the pass, so it is in neither number.
void add_peak(Suite& suite, const Shape& shape) {
  suite.add(RatioRow{.what = shape.name() + " fwd_bwd: peak bytes over s·(kTf + y + dx + parameter gradients)",
                     .numerator = fmt::format("execute/fwd_bwd/{}/threads1", shape.name()), .denominator = {}, .bar = 1.15,
                     .above = false, .scale = 1 / shape.minimal_bytes(), .of_peaks = true});
}

void add_shape(Suite& suite, const Shape& shape) {
  const auto f = std::make_shared<const LazyFixture>(shape);
  for (const char* pass : {"fwd", "fwd_bwd"}) {
    for (const int threads : {1, 2}) add_lines({suite, f, threads, true, pass});
    if (shape.load != "zipf") add_lines({suite, f, 1, false, pass});
  }
}

// Routing and moving rows as a part of the layer: what is left of it without the experts' products.
void add_share(Suite& suite, const Shape& shape, double bar) {
  const std::string tail = fmt::format("fwd_bwd/{}/threads1", shape.name());
  suite.add(RatioRow{shape.name() + " fwd_bwd, 1 thread: router, dispatch and combine, share of the layer (1 − bare/layer)",
                     "bare/" + tail, "moe_layer/" + tail, bar, false, 1, /*from_one=*/true});
}

}  // namespace

int main(int argc, char** argv) {
  Suite suite;
  const Shape coarse{4096, 256, 1024, 8, 2}, many{4096, 256, 1024, 64, 2}, fine{4096, 512, 256, 64, 8};
  for (const Shape& shape : {coarse, many, fine}) {
    add_shape(suite, shape);
    Shape uneven = shape;
    uneven.load = "zipf";
    add_shape(suite, uneven);
  }
  for (const int64_t experts : {8, 64}) add_shape(suite, {4096, 256, 1024, experts, 1});
  add_shape(suite, {4096, 256, 1024, 64, 1, "one"});
  add_shape(suite, {1024, 64, 256, 16, 2});
  add_shape(suite, {4096, 256, 128, 256, 8});
  add_shape(suite, {1024, 256, 128, 256, 8});
  add_share(suite, coarse, 0.15);
  add_share(suite, fine, 0.30);
  add_peak(suite, many);
  add_peak(suite, fine);
  return suite.run(argc, argv);
}
