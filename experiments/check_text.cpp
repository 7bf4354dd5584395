// The report of `check` for a person.
#include "experiments/check_report.h"

#include "experiments/text_table.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

namespace moelab {
namespace {

std::string mib(const Json& bytes) { return fmt::format("{:.1f} MiB", bytes.get<double>() / (1 << 20)); }
std::string number_text(const Json& value) { return value.is_null() ? "-" : fmt::format("{:.4g}", value.get<double>()); }

std::string memory_text(const Json& memory) {
  const std::string text = fmt::format("{} parameters, {} gradients, {} optimiser, about {} activations: about {}",
                                       mib(memory.at("parameters")), mib(memory.at("gradients")), mib(memory.at("optimizer")),
                                       mib(memory.at("activations_estimate")), mib(memory.at("total_estimate")));
  if (memory.at("total_estimate") < memory.at("machine")) return text;
  return text + fmt::format(", MORE THAN this machine's {}: take a smaller batch, more micro_batches, or recompute = true",
                            mib(memory.at("machine")));
}

DataKind kind_of(const Json& data) {
  for (const DataKind kind : {DataKind::kImages, DataKind::kVectors})
    if (data.at("holds") == to_string(kind)) return kind;
  return DataKind::kTokens;
}

// "60000 training images, 10000 validation images, 10 classes"; drawn without end where there is no number.
std::string samples_text(const Json& data) {
  const std::string words = data.at("holds"), count = data.at("train_samples") == 0 ? "endless" : data.at("train_samples").dump();
  return fmt::format("{} training {}, {} validation {}, {} classes", count, words, data.at("validation_sequences").dump(), words,
                     data.at("classes").dump());
}

std::string tokens_text(const Json& data) {
  return fmt::format("{} training tokens, {} validation sequences, vocabulary {}", data.at("train_tokens").dump(),
                     data.at("validation_sequences").dump(), data.at("vocabulary").dump());
}

std::string data_text(const Json& data) {
  const DataKind kind = kind_of(data);
  std::string text = fmt::format("{}: {}", data.at("name").get<std::string>(),
                                 kind == DataKind::kTokens ? tokens_text(data) : samples_text(data));
  if (data.at("train_bytes") != 0)
    text += fmt::format("; {} and {} bytes", data.at("train_bytes").dump(), data.at("validation_bytes").dump());
  if (!data.at("entropy_bits").is_null())
    text += fmt::format("; known entropy {} bits per {}", number_text(data.at("entropy_bits")), target_word(kind));
  return text;
}

std::string training_text(const Json& t, DataKind kind) {
  const std::string rows = kind == DataKind::kVectors
                               ? ""
                               : fmt::format(" of {} {}", t.at("context").dump(), kind == DataKind::kImages ? "rows" : "tokens");
  const std::string all = kind == DataKind::kTokens ? "tokens" : to_string(kind);
  return fmt::format("{} steps of {} {}s{} in {} micro-batches, {} {} in all, {}", t.at("steps").dump(), t.at("batch").dump(),
                     sample_word(kind), rows, t.at("micro_batches").dump(), t.at("tokens").dump(), all,
                     t.at("precision").get<std::string>());
}

std::string capacity_text(const Json& mode, DataKind kind) {
  if (mode.at("capacity_of_a_sequence").is_null()) return "no capacity limit";
  return fmt::format("{} places per expert for one {}, {} for a micro-batch", mode.at("capacity_of_a_sequence").dump(),
                     sample_word(kind), mode.at("capacity_of_a_micro_batch").dump());
}

// A model that is not causal may use a router that looks ahead, so nothing is said of it.
std::string mode_text(const Json& mode, const Json& model, DataKind kind) {
  if (!model.at("causal").get<bool>()) return capacity_text(mode, kind);
  return fmt::format("{}; {}: {}", capacity_text(mode, kind), mode.at("causal").get<bool>() ? "causal" : "LOOKS AHEAD",
                     mode.at("reason").get<std::string>());
}

std::string loss_text(const Json& loss) {
  return fmt::format("{} × {}, scope {}: {} at balance, {} at collapse", number_text(loss.at("coefficient")),
                     loss.at("label").get<std::string>(), loss.at("scope").get<std::string>(), number_text(loss.at("at_balance")),
                     number_text(loss.at("at_collapse")));
}

std::string layer_text(const Json& layer, const Json& model, DataKind kind) {
  const Json& k = layer.at("k");
  const Json& most = layer.at("max_experts");
  const std::string room = most == layer.at("experts") ? "" : fmt::format(" (room for {})", most.dump());
  std::string text = fmt::format("\n{}: {}, {} {} experts{}, k = {}\n", layer.at("site").get<std::string>(),
                                 layer.at("router").get<std::string>(), layer.at("experts").dump(),
                                 layer.at("expert").get<std::string>(), room, k.is_null() ? "varies" : k.dump());
  TextRows rows{{"training", mode_text(layer.at("train"), model, kind)},
                {"evaluation", mode_text(layer.at("eval"), model, kind)}};
  for (const Json& loss : layer.at("losses")) rows.push_back({"loss", loss_text(loss)});
  if (layer.at("losses").empty()) rows.push_back({"loss", "none"});
  return text + aligned_text(rows, 2);
}

}  // namespace

std::string check_text(const Json& report) {
  const Json &parameters = report.at("parameters"), &rate = report.at("learning_rate"), &training = report.at("training");
  const DataKind kind = kind_of(report.at("data"));
  std::string text = fmt::format("{} ({})\n", report.at("name").get<std::string>(), report.at("config_id").get<std::string>());
  text += aligned_text(
      {{"model", report.at("model").at("name")},
       {"parameters",
        fmt::format("{} total, {} active per {}", parameters.at("total").dump(), parameters.at("active").dump(), row_word(kind))},
       {"FLOPs", fmt::format("{:.4g} per {}, forward", report.at("flops_per_token").get<double>(), row_word(kind))},
       {"memory", memory_text(report.at("memory_bytes"))},
       {"data", data_text(report.at("data"))},
       {"training", training_text(training, kind)},
       {"optimiser", fmt::format("{}; learning rate {} at the first step, peak {}, {} at the last",
                                 training.at("optimizer").get<std::string>(), number_text(rate.at("first")),
                                 number_text(rate.at("peak")), number_text(rate.at("last")))},
       {"unused experts", training.at("unused_experts") == "skip" ? "skipped by the optimiser"
                                                                  : "get a zero gradient: moments and weight decay go on"}},
      2);
  for (const Json& layer : report.at("layers")) text += layer_text(layer, report.at("model"), kind);
  if (report.at("layers").empty()) text += "\nno layer routes\n";
  for (const Json& site : report.at("sees_future"))
    text += "\nthe training loss sees the future: " + site.get<std::string>() + "\n";
  for (const Json& warning : report.at("warnings")) text += "\nwarning: " + warning.get<std::string>() + "\n";
  return text + "\nnothing is refused\n";
}

}  // namespace moelab
