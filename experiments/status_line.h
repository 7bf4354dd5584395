// What a person sees while a run goes on: one line that is rewritten on a terminal, plain lines elsewhere.
#pragma once

#include "trainers/observer.h"

#include <chrono>

namespace moelab {

class StatusLine : public Observer {
 public:
  explicit StatusLine(DataKind data);
  Request on_step(const StepView& view) override;
  void on_evaluation(const Evaluation& evaluation, int64_t step, bool final) override;
  void on_event(const std::string& site, const Event& event, int64_t step) override;
  void on_end(int64_t step) override;

 private:
  void show(const std::string& text);
  void finish_line();
  DataKind data_;
  bool terminal_;
  bool color_;
  bool open_ = false;  // a line without its newline is on the screen
  int64_t first_step_ = -1;
  int64_t window_tokens_ = 0;
  std::chrono::steady_clock::time_point start_;
  std::chrono::steady_clock::time_point shown_;
};

}  // namespace moelab
