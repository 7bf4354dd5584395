// What `check` says of an experiment without training it.
#pragma once

#include "experiments/experiment.h"

#include <nlohmann/json_fwd.hpp>

namespace moelab {

nlohmann::ordered_json check_report(const Experiment& experiment);
std::string check_text(const nlohmann::ordered_json& report);

}  // namespace moelab
