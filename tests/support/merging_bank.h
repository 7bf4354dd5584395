// The smallest experts: expert e multiplies its rows by factor[e].
#pragma once

#include "core/expert.h"

namespace moelab::testing {

class FactorBank : public ExpertBank {
 public:
  FactorBank(int64_t width, const Tensor& factor_E) : width_(width), factor_E_(add_parameter("factor", factor_E)) {
    groups_.push_back({.first = 0, .experts = factor_E.size(0), .stacked = {{"factor", factor_E_}}});
  }
  int64_t output_width(int) const override { return width_; }
  double flops_per_row(int64_t) const override { return static_cast<double>(width_); }
  void reset_expert(int64_t, RandomKey) override {}
  bool has_forward_with() const override { return true; }
  Tensor forward_with(const std::vector<Tensor>& parameters, const Tensor& rows_ND) const override {
    return rows_ND.mul(parameters[0]);
  }
  Tensor forward(const ExpertContext& context, int) const override {
    return context.rows_ND.mul(factor_E_.repeat_interleave(context.offsets_E1.diff()).unsqueeze(1));
  }

 private:
  int64_t width_;
  Tensor factor_E_;
};

}  // namespace moelab::testing
