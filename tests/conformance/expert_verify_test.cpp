// The conformance kit of experts on banks that it has to find wanting, and on an honest one like them. (Every registered kind has
// a test of its own, `verify.<name>`.)
#include "core/execute.h"
#include "core/grouped.h"
#include "experiments/verify_expert.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <catch2/catch_test_macros.hpp>

#include <algorithm>

namespace moelab {
namespace {

enum class Fault {
  kNone,
  kMixesRows,
  kWrongExpert,
  kFlops,
  kDrawByNumber,
  kNoGradient,
  kHalfGradient,
  kResetsAll,
  kUncounted,
  kBfloatAlways,
  kNoneOnBase,
  kCountsBase
};

// A linear map that stands still.
class StillBase : public Module {
 public:
  StillBase(const ExpertSpec& spec, int64_t width)
      : w_DD_(add_parameter("w", normal_tensor(spec.init.with("base"), {width, width}, 0.3, spec.dtype), false)) {}
  Tensor w_DD_;
};

// y = w·x, and one thing wrong.
class FaultyBank : public ExpertBank {
 public:
  FaultyBank(const ExpertSpec& spec, Fault fault)
      : fault_(fault), width_(spec.width), first_(spec.first), experts_(spec.experts) {
    w_EDD_ = add_parameter("w", at::empty({spec.experts, width_, width_}, spec.dtype));
    if (fault == Fault::kUncounted) add_parameter("scale", at::ones({1}, spec.dtype));
    if (fault == Fault::kNoneOnBase || fault == Fault::kCountsBase) base_ = std::make_shared<StillBase>(spec, width_);
    groups_.push_back({.first = 0, .experts = spec.experts, .stacked = {{"w", w_EDD_}}});
    for (int64_t e = 0; e < spec.experts; ++e) draw(e, spec.init);
  }

  Tensor forward(const ExpertContext& context, int) const override {
    if (fault_ == Fault::kNoGradient) return rows_one_by_one(context);
    Tensor rows_ND = context.rows_ND;
    if (fault_ == Fault::kBfloatAlways) rows_ND = rows_ND.to(at::kBFloat16).to(rows_ND.scalar_type());
    if (fault_ == Fault::kHalfGradient) rows_ND = rows_ND.mul(0.5).add(rows_ND.detach().mul(0.5));
    Tensor y_ND = grouped_linear(rows_ND, w_EDD_, {}, context.offsets_E1);
    if (fault_ == Fault::kMixesRows && y_ND.size(0) > 1) y_ND = y_ND.add(y_ND.mean(0, true), 1e-3);
    return y_ND;
  }

  Tensor forward_with(const std::vector<Tensor>& parameters, const Tensor& rows_ND) const override {
    return at::linear(rows_ND, fault_ == Fault::kWrongExpert ? w_EDD_.select(0, 0) : parameters.at(0));
  }
  bool has_forward_with() const override { return true; }
  int64_t output_width(int) const override { return width_; }
  double flops_per_row(int64_t) const override {
    return static_cast<double>(width_ * width_) * (fault_ == Fault::kFlops ? 1 : fault_ == Fault::kCountsBase ? 4 : 2);
  }

  std::shared_ptr<Module> base() const override { return base_; }
  Tensor base_output(const Tensor& x_TD) const override { return base_ ? at::linear(x_TD, base_->w_DD_) : Tensor(); }
  Tensor run(const Plan& plan, const ExecuteInput& input) const override {
    return base_ ? base_output(input.x_TD).add(execute(plan, *this, input)) : Tensor();
  }

  void reset_expert(int64_t expert, RandomKey key) override {
    for (int64_t e = 0; e < experts_; ++e)
      if (e == expert || fault_ == Fault::kResetsAll) draw(e, key);
  }

 private:
  void draw(int64_t expert, RandomKey key) {
    const at::NoGradGuard no_grad;
    const int64_t id = first_ + expert + (fault_ == Fault::kDrawByNumber ? 100 * experts_ : 0);
    w_EDD_.select(0, expert).copy_(normal_tensor(key.with("w", id), {width_, width_}, 0.3, w_EDD_.scalar_type()));
  }

  // Of parameters that got no row, no gradient arrives: every expert is cut out and used alone, and none when there are no rows.
  Tensor rows_one_by_one(const ExpertContext& context) const {
    const auto* offset = context.offsets_E1.const_data_ptr<int64_t>();
    std::vector<Tensor> outputs{context.rows_ND.narrow(0, 0, 0)};
    for (int64_t e = 0; e < experts_; ++e)
      if (offset[e + 1] > offset[e])
        outputs.push_back(at::linear(context.rows_ND.slice(0, offset[e], offset[e + 1]), w_EDD_.select(0, e)));
    return at::cat(outputs);
  }

  Fault fault_;
  int64_t width_, first_, experts_;
  Tensor w_EDD_;
  std::shared_ptr<StillBase> base_;
};

struct ExpertMutant {
  std::string name;
  Fault fault;
  std::vector<std::string> deadly;  // the properties that have to find it, and no other
};

const std::vector<ExpertMutant>& expert_mutants() {
  static const std::vector<ExpertMutant> all{
      {"mutant_mixes_rows", Fault::kMixesRows, {"sparse", "soft", "rows_apart"}},
      {"mutant_wrong_expert", Fault::kWrongExpert, {"sparse", "soft", "rows_apart", "permutation"}},
      {"mutant_flops", Fault::kFlops, {"flops"}},
      {"mutant_draw_by_number", Fault::kDrawByNumber, {"initial_draw"}},
      {"mutant_no_gradient", Fault::kNoGradient, {"zero_gradients"}},
      {"mutant_half_gradient", Fault::kHalfGradient, {"sparse", "soft", "finite_differences"}},
      {"mutant_resets_all", Fault::kResetsAll, {"surgery"}},
      {"mutant_uncounted", Fault::kUncounted, {"counts"}},
      {"mutant_counts_base", Fault::kCountsBase, {"flops"}},
      {"mutant_bfloat_always", Fault::kBfloatAlways, {"sparse", "soft", "rows_apart", "finite_differences"}},
  };
  return all;
}

template <Fault fault>
ExpertEntry entry_with(const std::string& name) {
  return {.name = name, .title = "", .citation = "", .equation = "", .make = [](ExpertSpec spec) {
            return std::make_unique<FaultyBank>(spec, fault);
          }};
}

const Registration<ExpertEntry> registrations[] = {
    Registration<ExpertEntry>{entry_with<Fault::kNone>("control_linear")},
    Registration<ExpertEntry>{entry_with<Fault::kNoneOnBase>("control_on_base")},
    Registration<ExpertEntry>{entry_with<Fault::kCountsBase>("mutant_counts_base")},
    Registration<ExpertEntry>{entry_with<Fault::kMixesRows>("mutant_mixes_rows")},
    Registration<ExpertEntry>{entry_with<Fault::kWrongExpert>("mutant_wrong_expert")},
    Registration<ExpertEntry>{entry_with<Fault::kFlops>("mutant_flops")},
    Registration<ExpertEntry>{entry_with<Fault::kDrawByNumber>("mutant_draw_by_number")},
    Registration<ExpertEntry>{entry_with<Fault::kNoGradient>("mutant_no_gradient")},
    Registration<ExpertEntry>{entry_with<Fault::kHalfGradient>("mutant_half_gradient")},
    Registration<ExpertEntry>{entry_with<Fault::kResetsAll>("mutant_resets_all")},
    Registration<ExpertEntry>{entry_with<Fault::kUncounted>("mutant_uncounted")},
    Registration<ExpertEntry>{entry_with<Fault::kBfloatAlways>("mutant_bfloat_always")},
};

TEST_CASE("an honest bank, on a base or not, holds every property of experts, or hears why one does not apply") {
  for (const char* name : {"control_linear", "control_on_base"}) {
    const std::vector<Finding> findings = verify_expert(Registry<ExpertEntry>::instance().find(name), {.cases = 8});
    CHECK(findings.size() == expert_properties().size());
    for (const Finding& finding : findings) {
      INFO(name << " " << finding.property << ": " << finding.reason);
      CHECK(finding.verdict != Verdict::kFail);
      CHECK((finding.verdict == Verdict::kPass) == finding.reason.empty());
      if (finding.property == "flops") CHECK(finding.verdict == Verdict::kPass);
    }
  }
}

TEST_CASE("every faulty bank is found by the properties made for its fault, with a reason that names the case, and by no other") {
  for (const ExpertMutant& mutant : expert_mutants()) {
    int64_t found = 0;
    for (const Finding& finding : verify_expert(Registry<ExpertEntry>::instance().find(mutant.name), {.cases = 8})) {
      const bool deadly = std::count(mutant.deadly.begin(), mutant.deadly.end(), finding.property) > 0;
      INFO(mutant.name << " " << finding.property << ": " << finding.reason);
      CHECK((finding.verdict == Verdict::kFail) == deadly);
      if (finding.verdict != Verdict::kFail) continue;
      CHECK(finding.reason.find("seed") != std::string::npos);
      ++found;
    }
    CHECK(found == static_cast<int64_t>(mutant.deadly.size()));
  }
}

TEST_CASE("a kind of expert that cannot be built fails every property with the reason") {
  static const Registration<ExpertEntry> broken{
      {.name = "mutant_unbuilt",
       .title = "",
       .citation = "",
       .equation = "",
       .make = [](ExpertSpec) -> std::unique_ptr<ExpertBank> { throw std::runtime_error("no memory"); }}};
  for (const Finding& finding : verify_expert(Registry<ExpertEntry>::instance().find("mutant_unbuilt"), {}))
    CHECK((finding.verdict == Verdict::kFail && finding.reason == "it cannot be built: no memory"));
}

}  // namespace
}  // namespace moelab
