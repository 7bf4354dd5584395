// The folder of one run: config.toml (verbatim), config.resolved.toml, env.json, metrics.jsonl, events.jsonl, summary.json,
// STATUS, ckpt/, and tokenizer.model where one was learned. It is locked while a process trains in it.
#pragma once

#include "core/io/files.h"
#include "core/io/jsonl.h"
#include "trainers/observer.h"

#include <nlohmann/json.hpp>

#include <chrono>
#include <memory>
#include <string>

namespace moelab {

class RunFolder {
 public:
  // A new folder. `path` "" means runs/<name>/<UTC time>-<config id>-s<seed>. Refuses one that holds a run already.
  static std::unique_ptr<RunFolder> create(const std::string& path, const std::string& name, const std::string& config_id,
                                           int64_t seed, const std::string& config_path, const std::string& resolved);
  // An existing one, for `resume` and `eval`. Error(kData) when it is none.
  static std::unique_ptr<RunFolder> open(const std::string& path);

  const std::string& path() const { return path_; }
  std::string checkpoints() const { return path_ + "/ckpt"; }
  std::string resolved_config() const { return path_ + "/config.resolved.toml"; }
  std::string file(const std::string& name) const { return path_ + "/" + name; }

  void keep_tokenizer(const std::string& tokenizer);  // as tokenizer.model, where there is something to keep
  std::string tokenizer() const;                      // what it holds, "" = nothing

  void lock();                                // Error(kUsage) naming the process that holds it
  void set_status(const std::string& line);   // STATUS
  void drop_records_after(int64_t step);      // metrics and events that a resumed run will write again

 private:
  explicit RunFolder(std::string path) : path_(std::move(path)) {}
  std::string path_;
  std::unique_ptr<RunLock> lock_;
};

// Error(kData) where a run was stopped before its first checkpoint; what is no run folder passes.
void require_checkpoint(const std::string& run);

// Writes metrics.jsonl and events.jsonl.
class RecordWriter : public Observer {
 public:
  explicit RecordWriter(const RunFolder& folder);
  Request on_step(const StepView& view) override;
  void on_evaluation(const Evaluation& evaluation, int64_t step, bool final) override;
  void on_checkpoint(const std::string& folder, int64_t step) override;
  void on_event(const std::string& site, const Event& event, int64_t step) override;
  void event(int64_t step, const std::string& kind, const nlohmann::json& details);
  void continue_from(int64_t tokens) { tokens_ = tokens; }  // target tokens before this process
  double seconds() const;  // of all sessions: this one after the last record that was there

 private:
  JsonlWriter metrics_;
  JsonlWriter events_;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  double before_ = 0;  // seconds of the sessions before this one
  int64_t tokens_ = 0;
  int64_t window_tokens_ = 0;
  double window_start_ = 0;
};

// Metric names and values of an evaluation: eval.loss, eval.bits_per_byte, eval.accuracy, eval.layer.3.load_cv2, …,
// eval.layer.3.loss.balance, eval.layer.3.loss.balance.weighted.
std::map<std::string, double> evaluation_metrics(const Evaluation& evaluation);

}  // namespace moelab
