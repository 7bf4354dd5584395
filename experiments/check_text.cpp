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
  return fmt::format("{} parameters, {} gradients, {} optimiser, about {} activations: about {}", mib(memory.at("parameters")),
                     mib(memory.at("gradients")), mib(memory.at("optimizer")), mib(memory.at("activations_estimate")),
                     mib(memory.at("total_estimate")));
}

std::string data_text(const Json& data) {
  std::string text = fmt::format("{}: {} training tokens, {} validation sequences, vocabulary {}", data.at("name").get<std::string>(),
                                 data.at("train_tokens").dump(), data.at("validation_sequences").dump(), data.at("vocabulary").dump());
  if (data.at("train_bytes") != 0)
    text += fmt::format("; {} and {} bytes", data.at("train_bytes").dump(), data.at("validation_bytes").dump());
  if (!data.at("entropy_bits").is_null()) text += fmt::format("; known entropy {} bits per token", number_text(data.at("entropy_bits")));
  return text;
}

std::string training_text(const Json& t) {
  return fmt::format("{} steps of {} sequences of {} tokens in {} micro-batches, {} tokens in all, {}", t.at("steps").dump(),
                     t.at("batch").dump(), t.at("context").dump(), t.at("micro_batches").dump(), t.at("tokens").dump(),
                     t.at("precision").get<std::string>());
}

std::string capacity_text(const Json& mode) {
  if (mode.at("capacity_of_a_sequence").is_null()) return "no capacity limit";
  return fmt::format("{} places per expert for one sequence, {} for a micro-batch", mode.at("capacity_of_a_sequence").dump(),
                     mode.at("capacity_of_a_micro_batch").dump());
}

std::string mode_text(const Json& mode) {
  return fmt::format("{}; {}: {}", capacity_text(mode), mode.at("causal").get<bool>() ? "causal" : "LOOKS AHEAD",
                     mode.at("reason").get<std::string>());
}

std::string loss_text(const Json& loss) {
  return fmt::format("{} × {}, scope {}: {} at balance, {} at collapse", number_text(loss.at("coefficient")),
                     loss.at("label").get<std::string>(), loss.at("scope").get<std::string>(), number_text(loss.at("at_balance")),
                     number_text(loss.at("at_collapse")));
}

std::string layer_text(const Json& layer) {
  const Json& k = layer.at("k");
  const Json& most = layer.at("max_experts");
  const std::string room = most == layer.at("experts") ? "" : fmt::format(" (room for {})", most.dump());
  std::string text = fmt::format("\n{}: {}, {} {} experts{}, k = {}\n", layer.at("site").get<std::string>(),
                                 layer.at("router").get<std::string>(), layer.at("experts").dump(),
                                 layer.at("expert").get<std::string>(), room, k.is_null() ? "varies" : k.dump());
  TextRows rows{{"training", mode_text(layer.at("train"))}, {"evaluation", mode_text(layer.at("eval"))}};
  for (const Json& loss : layer.at("losses")) rows.push_back({"loss", loss_text(loss)});
  if (layer.at("losses").empty()) rows.push_back({"loss", "none"});
  return text + aligned_text(rows, 2);
}

}  // namespace

std::string check_text(const Json& report) {
  const Json &parameters = report.at("parameters"), &rate = report.at("learning_rate"), &training = report.at("training");
  std::string text = fmt::format("{} ({})\n", report.at("name").get<std::string>(), report.at("config_id").get<std::string>());
  text += aligned_text({{"parameters", fmt::format("{} total, {} active per token", parameters.at("total").dump(), parameters.at("active").dump())},
                        {"FLOPs", fmt::format("{:.4g} per token, forward", report.at("flops_per_token").get<double>())},
                        {"memory", memory_text(report.at("memory_bytes"))},
                        {"data", data_text(report.at("data"))},
                        {"training", training_text(training)},
                        {"optimiser", fmt::format("{}; learning rate {} at the first step, peak {}, {} at the last",
                                                  training.at("optimizer").get<std::string>(), number_text(rate.at("first")),
                                                  number_text(rate.at("peak")), number_text(rate.at("last")))},
                        {"unused experts", training.at("unused_experts") == "skip"
                                               ? "skipped by the optimiser"
                                               : "get a zero gradient: moments and weight decay go on"}},
                       2);
  for (const Json& layer : report.at("layers")) text += layer_text(layer);
  if (report.at("layers").empty()) text += "\nno layer routes\n";
  for (const Json& site : report.at("sees_future")) text += "\nthe training loss sees the future: " + site.get<std::string>() + "\n";
  return text + "\nnothing is refused\n";
}

}  // namespace moelab
