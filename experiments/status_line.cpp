#include "experiments/status_line.h"

#include <fmt/format.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <numbers>
#include <unistd.h>

namespace moelab {
namespace {

double since(std::chrono::steady_clock::time_point then) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - then).count();
}

// The layer whose busiest, or heaviest, expert is furthest above its mean, and the dead experts of all layers.
std::string balance_text(const MetricsWindow& window) {
  double worst = 0;
  std::string where;
  int64_t dead = 0;
  for (size_t s = 0; s < window.records().size(); ++s) {
    const std::map<std::string, double> m = metrics_of(window.records()[s]);
    if (!std::isnan(m.at("dead"))) dead += static_cast<int64_t>(m.at("dead"));
    const double here = m.at(window.records()[s].weight_E.empty() ? "max_over_mean" : "weight_max_over_mean");
    if (!(here > worst)) continue;
    worst = here;
    where = window.labels()[s];
  }
  return where.empty() ? "" : fmt::format(" | max/mean {:.2f} ({}) | dead {}", worst, where, dead);
}

}  // namespace

StatusLine::StatusLine(DataKind data)
    : data_(data), terminal_(isatty(STDERR_FILENO) != 0), color_(terminal_ && std::getenv("NO_COLOR") == nullptr),
      start_(std::chrono::steady_clock::now()), shown_(start_) {}

Request StatusLine::on_step(const StepView& view) {
  if (first_step_ < 0) first_step_ = view.step;
  window_tokens_ += view.result.target_tokens;
  if (!view.flush) return Request::kNone;
  const double done = static_cast<double>(view.step + 1 - first_step_);
  const double left = since(start_) / done * static_cast<double>(view.total_steps - view.step - 1);
  const std::map<std::string, double> m = view.window.metrics();
  show(fmt::format("step {}/{} | loss {:.4f} ({:.3f} bits/{}) | {:.0f} {}/s{} | {:.0f} s left", view.step + 1, view.total_steps,
                   m.at("loss"), m.at("bits_per_token"), target_word(data_), static_cast<double>(window_tokens_) / since(shown_),
                   data_ == DataKind::kTokens ? "tok" : to_string(data_), balance_text(view.window), left));
  shown_ = std::chrono::steady_clock::now();
  window_tokens_ = 0;
  return Request::kNone;
}

void StatusLine::on_evaluation(const Evaluation& evaluation, int64_t step, bool) {
  finish_line();
  const bool known = !std::isnan(evaluation.bits_per_byte);
  const double bits = known ? evaluation.bits_per_byte : evaluation.loss / std::numbers::ln2;
  const std::string predicted = data_ == DataKind::kTokens ? fmt::format(" {:.4f} bits/{},", bits, known ? "byte" : "token") : "";
  const std::string given = evaluation.prompt == 0 ? "" : fmt::format(" after prompts of {}", evaluation.prompt);
  fmt::print(stderr, "eval at step {}: loss {:.4f},{} accuracy {:.3f}, {} {}{}\n", step, evaluation.loss, predicted,
             evaluation.accuracy, evaluation.tokens, to_string(data_), given);
}

void StatusLine::on_event(const std::string& site, const Event& event, int64_t step) {
  finish_line();
  fmt::print(stderr, "step {}: {}: {}\n", step + 1, site, event.note);
}

void StatusLine::on_end(int64_t) { finish_line(); }

void StatusLine::show(const std::string& text) {
  if (!terminal_) {
    fmt::print(stderr, "{}\n", text);
    return;
  }
  fmt::print(stderr, "\r\033[K{}{}{}", color_ ? "\033[36m" : "", text, color_ ? "\033[0m" : "");
  std::fflush(stderr);
  open_ = true;
}

void StatusLine::finish_line() {
  if (open_) fmt::print(stderr, "\n");
  open_ = false;
}

}  // namespace moelab
