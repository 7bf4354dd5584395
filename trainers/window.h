// What metrics.jsonl reports: steps summed since the last flush. Its state is part of the checkpoint, so that a resumed run
// writes the same lines as one that was never stopped.
#pragma once

#include "trainers/step.h"

#include <nlohmann/json_fwd.hpp>

#include <map>
#include <string>
#include <vector>

namespace moelab {

class MetricsWindow {
 public:
  explicit MetricsWindow(const std::vector<Site*>& sites);

  void add(const StepResult& step, double lr, double gradient_norm);
  void reset();
  int64_t steps() const { return steps_; }

  // loss, loss.total, bits_per_token, lr, gradient_norm (mean), objective metrics, and for every site the metrics of
  // diagnostics.h and each routing loss raw, weighted: "layer.3.load_cv2", "layer.3.loss.balance", "….weighted".
  std::map<std::string, double> metrics() const;

  const std::vector<RoutingRecord>& records() const { return records_; }
  const std::vector<std::string>& labels() const { return labels_; }

  nlohmann::json save() const;
  void load(const nlohmann::json& state);

 private:
  std::vector<std::string> labels_;
  std::vector<std::vector<std::string>> terms_;  // labels of each site's losses
  int64_t steps_ = 0;
  int64_t targets_ = 0;
  double task_ = 0;    // Σ nats over target tokens
  double total_ = 0;   // Σ over steps
  double norm_ = 0;
  double lr_ = 0;      // of the last step
  std::map<std::string, double> sums_;  // "<site>.loss.<label>" and objective metrics, over steps
  std::vector<RoutingRecord> records_;
};

}  // namespace moelab
