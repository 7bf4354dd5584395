#include "trainers/window.h"

#include "core/io/jsonl.h"
#include "trainers/evaluate.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <numbers>

namespace moelab {
namespace {

nlohmann::json to_json(const RoutingRecord& r) {
  return {{"experts", r.experts},           {"active", r.active_E},         {"chosen", r.chosen_E},
          {"accepted", r.accepted_E},       {"weight", r.weight_E},         {"rows", r.rows},
          {"left_behind", r.left_behind},   {"dropped", r.dropped},         {"first_chosen", r.first_chosen},
          {"first_dropped", r.first_dropped}, {"places", r.places},         {"entropy_sum", r.entropy_sum},
          {"entropy_rows", r.entropy_rows}};
}

RoutingRecord record_from_json(const nlohmann::json& j) {
  RoutingRecord r;
  r.experts = j.at("experts");
  r.active_E = j.at("active").get<std::vector<int64_t>>();
  r.chosen_E = j.at("chosen").get<std::vector<int64_t>>();
  r.accepted_E = j.at("accepted").get<std::vector<int64_t>>();
  r.weight_E = j.at("weight").get<std::vector<double>>();
  r.rows = j.at("rows");
  r.left_behind = j.at("left_behind");
  r.dropped = j.at("dropped");
  r.first_chosen = j.at("first_chosen");
  r.first_dropped = j.at("first_dropped");
  r.places = j.at("places");
  r.entropy_sum = json_number(j.at("entropy_sum"));
  r.entropy_rows = j.at("entropy_rows");
  return r;
}

}  // namespace

MetricsWindow::MetricsWindow(const std::vector<Site*>& sites) : labels_(site_labels(sites)), records_(sites.size()) {
  for (const Site* site : sites) {
    terms_.emplace_back();
    for (const LossTerm& term : site->losses) terms_.back().push_back(term.label);
  }
}

void MetricsWindow::add(const StepResult& step, double lr, double gradient_norm) {
  ++steps_;
  targets_ += step.target_tokens;
  task_ += step.task_loss * static_cast<double>(step.target_tokens);
  total_ += step.total_loss;
  norm_ += gradient_norm;
  lr_ = lr;
  for (const auto& [name, value] : step.metrics) sums_[name] += value;
  for (size_t s = 0; s < records_.size(); ++s) {
    records_[s].add(step.records[s]);
    for (size_t t = 0; t < terms_[s].size(); ++t) {
      const std::string name = labels_[s] + ".loss." + terms_[s][t];
      sums_[name] += step.terms[s][t].value;
      sums_[name + ".weighted"] += step.terms[s][t].weighted;
    }
  }
}

void MetricsWindow::reset() {
  steps_ = targets_ = 0;
  task_ = total_ = norm_ = lr_ = 0;
  sums_.clear();
  for (RoutingRecord& record : records_) record = {};
}

std::map<std::string, double> MetricsWindow::metrics() const {
  const double steps = static_cast<double>(std::max<int64_t>(1, steps_));
  const double loss = task_ / static_cast<double>(std::max<int64_t>(1, targets_));
  std::map<std::string, double> m{{"loss", loss}, {"bits_per_token", loss / std::numbers::ln2}, {"loss.total", total_ / steps},
                                  {"gradient_norm", norm_ / steps}, {"lr", lr_}};
  for (const auto& [name, sum] : sums_) m[name] = sum / steps;
  for (size_t s = 0; s < records_.size(); ++s)
    for (const auto& [name, value] : metrics_of(records_[s])) m[labels_[s] + "." + name] = value;
  return m;
}

nlohmann::json MetricsWindow::save() const {
  nlohmann::json records = nlohmann::json::array();
  for (const RoutingRecord& record : records_) records.push_back(to_json(record));
  return {{"steps", steps_}, {"targets", targets_}, {"task", task_}, {"total", total_}, {"norm", norm_}, {"lr", lr_},
          {"sums", sums_}, {"records", records}};
}

void MetricsWindow::load(const nlohmann::json& state) {
  steps_ = state.at("steps");
  targets_ = state.at("targets");
  task_ = json_number(state.at("task"));
  total_ = json_number(state.at("total"));
  norm_ = json_number(state.at("norm"));
  lr_ = json_number(state.at("lr"));
  sums_.clear();
  for (const auto& [name, value] : state.at("sums").items()) sums_[name] = json_number(value);
  records_.clear();
  for (const nlohmann::json& record : state.at("records")) records_.push_back(record_from_json(record));
}

}  // namespace moelab
