// What `check` says of an experiment without training it.
#pragma once

#include "experiments/experiment.h"
#include "experiments/json.h"

namespace moelab {

Json check_report(const Experiment& experiment);
std::string check_text(const Json& report);

}  // namespace moelab
