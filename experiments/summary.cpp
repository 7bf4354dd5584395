#include "experiments/summary.h"

#include "core/model/block.h"
#include "datasets/ngram.h"
#include "trainers/generate.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cctype>
#include <limits>
#include <numbers>
#include <numeric>

namespace moelab {
namespace {

constexpr int kLongestContext = 5;

// Missing is null, never absent; JSON has no NaN.
nlohmann::json summary_number(double value) { return std::isnan(value) ? nlohmann::json() : nlohmann::json(value); }

// 1 for each expert that was there at some time.
std::vector<int> active_flags(const RoutingRecord& record) {
  std::vector<int> flags;
  for (const int64_t rows : record.active_E) flags.push_back(rows > 0);
  return flags;
}

// Each expert's share in the outputs of a plan that mixes all; null for a sparse one.
nlohmann::json weight_shares(const RoutingRecord& record) {
  const double total = std::accumulate(record.weight_E.begin(), record.weight_E.end(), 0.0);
  if (total == 0) return {};
  std::vector<double> shares = record.weight_E;
  for (double& share : shares) share /= total;
  return shares;
}

void add_record(nlohmann::json& out, const std::string& prefix, const RoutingRecord& record) {
  out[prefix + ".load"] = record.chosen_E;
  out[prefix + ".weight"] = weight_shares(record);
  out[prefix + ".active"] = active_flags(record);
  for (const auto& [name, value] : metrics_of(record)) out[prefix + "." + name] = summary_number(value);
}

// A loss that is a sum grows with the rows, and so do its landmarks.
void add_losses(nlohmann::json& out, const std::string& prefix, const Site& site, const std::vector<TermReading>& values,
                int64_t rows) {
  const Router& router = *site.router;
  const int64_t k = std::max<int64_t>(1, choices_per_row(router.facts(), router.spec(), Mode::kEval));
  for (size_t t = 0; t < site.losses.size(); ++t) {
    const LossTerm& term = site.losses[t];
    const Landmarks marks = term.loss->landmarks_among(router.active_experts(), router.spec().max_experts, k);
    const double scale = term.loss->reduces_by_sum() ? static_cast<double>(std::max<int64_t>(1, rows)) : 1;
    const std::string key = prefix + ".loss." + term.label;
    out[key] = t < values.size() ? summary_number(values[t].value) : nlohmann::json();
    out[key + ".weighted"] = t < values.size() ? summary_number(values[t].weighted) : nlohmann::json();
    out[key + ".at_balance"] = summary_number(marks.balance * scale);
    out[key + ".at_collapse"] = summary_number(marks.collapse * scale);
  }
}

// Of all pairs, or of all weight.
double share_of_busiest(const RoutingRecord& record) {
  const std::vector<double> load_E = record.weight_E.empty() ? std::vector<double>(record.chosen_E.begin(), record.chosen_E.end())
                                                             : record.weight_E;
  const double all = std::accumulate(load_E.begin(), load_E.end(), 0.0);
  return all == 0 ? 0 : *std::max_element(load_E.begin(), load_E.end()) / all;
}

std::string printable(const std::string& bytes) {
  std::string out;
  for (const char c : bytes) out += c == '\n' || std::isprint(static_cast<unsigned char>(c)) ? c : '?';
  return out;
}

std::string loads_text(const nlohmann::json& load, const nlohmann::json& active) {
  double all = 0;
  for (const auto& count : load) all += count.get<double>();
  std::string text;
  for (size_t e = 0; e < load.size(); ++e)
    text += active.at(e) == 0 ? "     -" : fmt::format(" {:5.1f}", all == 0 ? 0 : 100 * load.at(e).get<double>() / all);
  return text;
}

std::string number_text(const nlohmann::json& value, const char* format) {
  return value.is_null() ? "-" : fmt::format(fmt::runtime(format), value.get<double>());
}

std::string sparse_balance_text(const nlohmann::json& s, const std::string& label) {
  const nlohmann::json& dropped = s.at(label + ".dropped");
  return fmt::format("{}  max/mean {}  dead {}  dropped {} %", loads_text(s.at(label + ".load"), s.at(label + ".active")),
                     number_text(s.at(label + ".max_over_mean"), "{:.2f}"), number_text(s.at(label + ".dead"), "{:.0f}"),
                     dropped.is_null() ? "0" : fmt::format("{:.1f}", 100 * dropped.get<double>()));
}

std::string mixture_balance_text(const nlohmann::json& s, const std::string& label) {
  return fmt::format("{}  of the outputs' weight  max/mean {}", loads_text(s.at(label + ".weight"), s.at(label + ".active")),
                     number_text(s.at(label + ".weight_max_over_mean"), "{:.2f}"));
}

std::string layers_text(const Experiment& experiment, const nlohmann::json& s) {
  std::string text = "\nload of each expert in the final evaluation, % of pairs:\n";
  const std::vector<Site*> sites = experiment.model->sites();
  const std::vector<std::string> labels = site_labels(sites);
  for (size_t i = 0; i < labels.size(); ++i)
    text += fmt::format(
        "  {:<10} {:<12}{}\n", labels[i], sites[i]->router->entry().name,
        s.at(labels[i] + ".weight").is_null() ? sparse_balance_text(s, labels[i]) : mixture_balance_text(s, labels[i]));
  for (size_t i = 0; i < labels.size(); ++i)
    for (const LossTerm& term : sites[i]->losses) {
      const std::string key = labels[i] + ".loss." + term.label;
      text += fmt::format("  {:<10} loss {:<12} {} (even {}, collapsed {})\n", labels[i], term.label,
                          number_text(s.at(key), "{:.4f}"), number_text(s.at(key + ".at_balance"), "{:.4f}"),
                          number_text(s.at(key + ".at_collapse"), "{:.4f}"));
    }
  return labels.empty() ? "" : text;
}

std::string baselines_text(const nlohmann::json& s) {
  std::string text;
  for (int c = 0; c <= kLongestContext; ++c) {
    const nlohmann::json& bits = s.at(fmt::format("baseline.ngram.context_{}.bits_per_byte", c));
    if (!bits.is_null()) text += fmt::format("  n-gram, {} bytes of context   {:.4f}\n", c, bits.get<double>());
  }
  if (!s.at("data.entropy_bits").is_null())
    text += fmt::format("  the source's own entropy      {:.4f}\n", s.at("data.entropy_bits").get<double>());
  return text;
}

// "" where all was scored.
std::string prompts_text(const nlohmann::json& s) {
  const auto prompt = s.at("eval.prompt").get<int64_t>();
  return prompt == 0 ? "" : fmt::format(" after prompts of {} tokens", prompt);
}

// "validation bits per byte, 107456 bytes in 39000 tokens:"
std::string units_text(bool text, const nlohmann::json& s) {
  const std::string tokens = s.at("eval.tokens").dump();
  const std::string scored = prompts_text(s);
  if (!text) return fmt::format("\nvalidation bits per token, {} tokens{}:\n", tokens, scored);
  const std::string bytes = number_text(s.at("eval.bytes"), "{:.0f}");
  const std::string apart = bytes == tokens ? "" : fmt::format(" in {} tokens", tokens);
  const bool other_bytes = !scored.empty() && !s.at("baseline.ngram.context_0.bits_per_byte").is_null();
  return fmt::format("\nvalidation bits per byte, {} bytes{}{}{}:\n", bytes, apart, scored,
                     other_bytes ? " (n-grams: of all bytes)" : "");
}

std::string model_bits_text(bool text, const nlohmann::json& s) {
  if (text) return fmt::format("  this model                    {}\n", number_text(s.at("eval.bits_per_byte"), "{:.4f}"));
  const nlohmann::json& nats = s.at("eval.loss");
  return fmt::format("  this model                    {:.4f}\n", nats.is_null() ? 0.0 : nats.get<double>() / std::numbers::ln2);
}

std::string prediction_text(bool text, const nlohmann::json& s) {
  return units_text(text, s) + baselines_text(s) + model_bits_text(text, s);
}

std::string classification_text(const DataShape& shape, const nlohmann::json& s) {
  std::string text = fmt::format("\nvalidation, {} {}, {} classes:\n", s.at("eval.tokens").dump(), to_string(shape.kind),
                                 shape.classes);
  if (!s.at("data.entropy_bits").is_null())
    text += fmt::format("  knowing the source            loss {:.4f} nats\n",
                        s.at("data.entropy_bits").get<double>() * std::numbers::ln2);
  return text + fmt::format("  this model                    loss {} nats, accuracy {}\n",
                            number_text(s.at("eval.loss"), "{:.4f}"), number_text(s.at("eval.accuracy"), "{:.4f}"));
}

}  // namespace

RunVerdict verdict_of(const Evaluation& evaluation) {
  RunVerdict verdict{"not applicable", "no site counts its experts"};
  for (size_t s = 0; s < evaluation.records.size(); ++s) {
    const RoutingRecord& record = evaluation.records[s];
    const bool mixes = !record.weight_E.empty();
    if ((record.chosen_E.empty() && !mixes) || record.rows == 0) continue;
    const auto experts = static_cast<double>(record.active_experts());
    const std::map<std::string, double> m = metrics_of(record);
    const double effective = m.at(mixes ? "weight_effective_experts" : "effective_experts");
    if (experts > 1 && effective < experts / 2)
      return {"collapsed",
              fmt::format("{}: {:.2f} effective experts of {:.0f}, below half", evaluation.labels[s], effective, experts)};
    if (experts >= 4 && share_of_busiest(record) > 0.5)
      return {"collapsed", fmt::format("{}: one expert takes {:.0f} % of the {}", evaluation.labels[s],
                                       100 * share_of_busiest(record), mixes ? "weight" : "pairs")};
    if (verdict.word == "dead experts") continue;
    if (m.at("dead") > 0)
      verdict = {"dead experts",
                 fmt::format("{}: {:.0f} experts got no token in the whole evaluation", evaluation.labels[s], m.at("dead"))};
    else verdict = {"healthy", "every expert of every layer was used, none took more than its bound"};
  }
  return verdict;
}

std::vector<double> ngram_baselines(const Experiment& experiment) {
  const auto& train = experiment.data->train_bytes();
  const auto& validation = experiment.data->validation_bytes();
  if (!experiment.train.ngram_baselines || train.empty() || validation.empty()) return {};
  return bits_per_byte(NgramModel(train, kLongestContext), validation);
}

nlohmann::json summarise(const Experiment& experiment, const Trainer& trainer, const std::string& outcome, double seconds,
                         const std::vector<double>& baselines, const std::string& error) {
  const Evaluation& evaluation = trainer.last_evaluation();
  const bool evaluated = outcome == "done";
  const std::vector<Site*> sites = experiment.model->sites();
  const std::vector<std::string> labels = site_labels(sites);
  const double none = std::numeric_limits<double>::quiet_NaN();
  nlohmann::json s{{"name", experiment.name},
                   {"config_id", experiment.config_id},
                   {"seed", experiment.train.seed},
                   {"outcome", outcome},
                   {"error", error.empty() ? nlohmann::json() : nlohmann::json(error)},
                   {"step", trainer.step()},
                   {"tokens", trainer.tokens()},
                   {"seconds", seconds},
                   {"params.total", experiment.model->parameter_count()},
                   {"params.active", experiment.model->active_parameters()},
                   {"eval.loss", summary_number(evaluated ? evaluation.loss : none)},
                   {"eval.bits_per_byte", summary_number(evaluated ? evaluation.bits_per_byte : none)},
                   {"eval.accuracy", summary_number(evaluated ? evaluation.accuracy : none)},
                   {"eval.tokens", evaluated ? nlohmann::json(evaluation.tokens) : nlohmann::json()},
                   {"eval.bytes", summary_number(evaluated ? evaluation.bytes : none)},
                   {"eval.prompt", experiment.train.eval_prompt},
                   {"data.entropy_bits", summary_number(experiment.data->known_entropy_bits())}};
  for (int c = 0; c <= kLongestContext; ++c)
    s[fmt::format("baseline.ngram.context_{}.bits_per_byte", c)] =
        summary_number(c < static_cast<int>(baselines.size()) ? baselines[static_cast<size_t>(c)] : none);
  for (size_t i = 0; i < labels.size(); ++i) {
    const RoutingRecord record = evaluated ? evaluation.records[i] : RoutingRecord{};
    add_record(s, labels[i], record);
    add_losses(s, labels[i], *sites[i], evaluated ? evaluation.terms[i] : std::vector<TermReading>{}, record.rows);
    add_record(s, "train." + labels[i], trainer.last_window().records()[i]);
  }
  const RunVerdict unjudged{"not judged", "the run ended before its final evaluation"};
  RunVerdict verdict = evaluated ? verdict_of(evaluation) : unjudged;
  if (const std::string line = untrained_base(experiment); verdict.word == "healthy" && !line.empty())
    verdict = {"untrained base", line};
  s["verdict"] = verdict.word;
  s["verdict.reason"] = verdict.reason;
  return s;
}

std::string final_text(const Experiment& experiment, const nlohmann::json& s, const std::string& sample,
                       const std::string& folder) {
  const DataShape shape = experiment.data->shape();
  std::string text = shape.kind == DataKind::kTokens ? prediction_text(experiment.data->is_text(), s)
                                                     : classification_text(shape, s);
  text += layers_text(experiment, s);
  if (!sample.empty())
    text += fmt::format("\nwhat the model writes ({} bytes):\n---\n{}\n---\n", sample.size(), printable(sample));
  text += fmt::format("\nparameters {} ({} active per {}); {}s trained {}; {:.0f} s\n", s.at("params.total").dump(),
                      s.at("params.active").dump(), row_word(shape.kind), target_word(shape.kind), s.at("tokens").dump(),
                      s.at("seconds").get<double>());
  text += fmt::format("verdict: {} ({})\n", s.at("verdict").get<std::string>(), s.at("verdict.reason").get<std::string>());
  return text +
         fmt::format("everything lies in {}: summary.json, metrics.jsonl, events.jsonl, config.resolved.toml, ckpt/\n", folder);
}

std::string sample_text(const Experiment& experiment, int64_t bytes, int64_t step) {
  const Dataset& data = *experiment.data;
  const int64_t prompt_length = std::min<int64_t>(32, experiment.model->context() / 2);
  if (prompt_length == 0 || data.eval_sequences() == 0) return "";
  const Tensor start_L = data.eval_batch(0, 1).targets_BL[0];
  const auto* first = start_L.const_data_ptr<int64_t>();
  const std::vector<int64_t> prompt(first, first + prompt_length);
  if (data.text_of(prompt).empty()) return "";
  const SampleSettings settings{bytes, 0.8, experiment.train.seed, step, experiment.train.steps};  // a token has a byte or more
  return data.text_of(generate(*experiment.model, prompt, settings)).substr(0, bytes);
}

}  // namespace moelab
