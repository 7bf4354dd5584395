// Experiment files for readers that promise to take whatever the tables allow: `moelab route`, whose files other programs write.
#pragma once

#include "core/config.h"

namespace moelab {

// As load_config, but a value that another key leaves unread (OptionSpec::readers) is told on stderr instead of refused.
Table load_lenient_config(const std::string& path, const std::vector<std::string>& overrides = {});

}  // namespace moelab
