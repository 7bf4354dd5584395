#include "experiments/run_folder.h"

#include "core/error.h"
#include "core/io/checkpoint.h"

#include <ATen/Parallel.h>
#include <torch/version.h>

#include <fmt/chrono.h>
#include <fmt/format.h>

#include <algorithm>
#include <ctime>
#include <filesystem>

namespace moelab {
namespace {

namespace fs = std::filesystem;

std::string utc_now() { return fmt::format("{:%Y%m%dT%H%M%SZ}", fmt::gmtime(std::time(nullptr))); }

const char* event_name(Event::Kind kind) {
  switch (kind) {
    case Event::Kind::kFreeze: return "freeze";
    case Event::Kind::kUnfreeze: return "unfreeze";
    case Event::Kind::kExpertAdded: return "expert_added";
    case Event::Kind::kExpertRemoved: return "expert_removed";
    case Event::Kind::kStageChanged: return "stage_changed";
  }
  return "?";
}

size_t start_of_last_line(const std::string& text) { return text.size() < 2 ? 0 : text.rfind('\n', text.size() - 2) + 1; }

// When the last record was written, in seconds of the run; 0 without one.
double last_seconds(const std::string& path) {
  if (!fs::exists(path)) return 0;
  const std::string text = read_file(path);
  return text.empty() ? 0 : nlohmann::json::parse(text.substr(start_of_last_line(text))).at("seconds").get<double>();
}

// The final evaluation follows the last checkpoint, so a run that goes on from there writes it again.
void drop_final_evaluation(const std::string& path) {
  if (!fs::exists(path)) return;
  const std::string text = read_file(path);
  const size_t last = start_of_last_line(text);
  if (text.empty() || !nlohmann::json::parse(text.substr(last)).value("final", false)) return;
  write_file_atomically(path, text.substr(0, last));
}

// A lock alone is left where a start failed at once.
bool holds_files(const std::string& place) {
  if (!fs::exists(place)) return false;
  return std::any_of(fs::directory_iterator(place), fs::directory_iterator(),
                     [](const auto& entry) { return entry.path().filename() != ".lock"; });
}

nlohmann::json environment() {
  return {{"moelab", MOELAB_VERSION}, {"libtorch", TORCH_VERSION}, {"compiler", __VERSION__},
          {"threads", at::get_num_threads()}, {"started", utc_now()}};
}

}  // namespace

std::unique_ptr<RunFolder> RunFolder::create(const std::string& path, const std::string& name, const std::string& config_id,
                                             int64_t seed, const std::string& config_path, const std::string& resolved) {
  const std::string place = !path.empty() ? path : fmt::format("runs/{}/{}-{}-s{}", name, utc_now(), config_id, seed);
  if (fs::exists(place) && !fs::is_directory(place))
    usage_error(fmt::format("{} is a file; choose another folder with --out", place));
  if (holds_files(place))
    usage_error(fmt::format("{} holds a run already: use `moelab resume {}`, or choose another folder with --out", place, place));
  make_folders(place);
  std::unique_ptr<RunFolder> folder(new RunFolder(place));
  folder->lock();
  try {
    write_file_atomically(folder->file("config.toml"), read_file(config_path));
    write_file_atomically(folder->resolved_config(), resolved);
    write_file_atomically(folder->file("env.json"), environment().dump(2) + "\n");
    folder->set_status("started");
  } catch (...) {
    std::error_code ignored;
    fs::remove_all(place, ignored);  // ours: it was empty, and we hold its lock
    throw;
  }
  return folder;
}

std::unique_ptr<RunFolder> RunFolder::open(const std::string& path) {
  if (!fs::exists(path + "/config.resolved.toml")) data_error(path + " is no run folder: it has no config.resolved.toml");
  return std::unique_ptr<RunFolder>(new RunFolder(path));
}

void RunFolder::keep_tokenizer(const std::string& tokenizer) {
  if (!tokenizer.empty() && !fs::exists(file("tokenizer.model"))) write_file_atomically(file("tokenizer.model"), tokenizer);
}

std::string RunFolder::tokenizer() const { return fs::exists(file("tokenizer.model")) ? read_file(file("tokenizer.model")) : ""; }

void RunFolder::lock() { lock_ = std::make_unique<RunLock>(path_); }

void RunFolder::set_status(const std::string& line) { write_file_atomically(file("STATUS"), line + "\n"); }

void RunFolder::drop_records_after(int64_t step) {
  truncate_after_step(file("metrics.jsonl"), step);
  drop_final_evaluation(file("metrics.jsonl"));
  truncate_after_step(file("events.jsonl"), step);
}

void require_checkpoint(const std::string& run) {
  if (!fs::exists(run + "/config.resolved.toml")) return;
  if (fs::is_directory(run + "/ckpt") && !checkpoint_steps(run + "/ckpt").empty()) return;
  data_error(fmt::format("{} has no checkpoint yet: it was stopped before the first; go on with `moelab resume {}`", run, run));
}

RecordWriter::RecordWriter(const RunFolder& folder)
    : metrics_(folder.file("metrics.jsonl")), events_(folder.file("events.jsonl")),
      before_(std::max(last_seconds(folder.file("metrics.jsonl")), last_seconds(folder.file("events.jsonl")))),
      window_start_(before_) {}

double RecordWriter::seconds() const {
  return before_ + std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
}

// Steps are written as the number of finished ones, so that a checkpoint's step and the last record before it agree.
Request RecordWriter::on_step(const StepView& view) {
  tokens_ = view.tokens;
  window_tokens_ += view.result.target_tokens;
  if (!view.flush) return Request::kNone;
  const double now = seconds();
  metrics_.append({{"step", view.step + 1}, {"tokens", tokens_}, {"seconds", now}, {"m", view.window.metrics()},
                   {"timing", {{"tokens_per_second", static_cast<double>(window_tokens_) / (now - window_start_)}}}});
  window_tokens_ = 0;
  window_start_ = now;
  return Request::kNone;
}

void RecordWriter::on_evaluation(const Evaluation& evaluation, int64_t step, bool final) {
  metrics_.append(
      {{"step", step}, {"tokens", tokens_}, {"seconds", seconds()}, {"final", final}, {"m", evaluation_metrics(evaluation)}});
}

void RecordWriter::on_checkpoint(const std::string& folder, int64_t step) {
  metrics_.sync();
  events_.sync();
  event(step, "checkpoint", {{"folder", fs::path(folder).filename().string()}});
}

void RecordWriter::on_event(const std::string& site, const Event& happened, int64_t step) {
  event(step + 1, event_name(happened.kind), {{"site", site}, {"expert", happened.expert}, {"note", happened.note}});
}

void RecordWriter::event(int64_t step, const std::string& kind, const nlohmann::json& details) {
  events_.append({{"step", step}, {"seconds", seconds()}, {"event", kind}, {"details", details}});
}

std::map<std::string, double> evaluation_metrics(const Evaluation& evaluation) {
  std::map<std::string, double> m{{"eval.loss", evaluation.loss}, {"eval.bits_per_byte", evaluation.bits_per_byte},
                                  {"eval.accuracy", evaluation.accuracy}, {"eval.tokens", static_cast<double>(evaluation.tokens)},
                                  {"eval.bytes", evaluation.bytes},
                                  {"eval.prompt", static_cast<double>(evaluation.prompt)}};
  for (size_t s = 0; s < evaluation.labels.size(); ++s) {
    const std::string prefix = "eval." + evaluation.labels[s] + ".";
    for (const auto& [name, value] : metrics_of(evaluation.records[s])) m[prefix + name] = value;
    for (size_t t = 0; t < evaluation.terms[s].size(); ++t) {
      const std::string name = prefix + "loss." + evaluation.term_labels[s][t];
      m[name] = evaluation.terms[s][t].value;
      m[name + ".weighted"] = evaluation.terms[s][t].weighted;
    }
  }
  return m;
}

}  // namespace moelab
