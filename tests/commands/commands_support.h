// What the tests of the commands share.
#pragma once

#include "tests/support/program.h"
#include "tests/support/tiny_experiment.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <string>
#include <vector>

namespace moelab::test {

inline ProgramResult moelab_in(const std::string& folder, const std::vector<std::string>& arguments) {
  return run_moelab(arguments, folder);
}

inline ProgramResult moelab_run(const std::vector<std::string>& arguments) { return moelab_in("", arguments); }

// The one JSON document on stdout; a parse error fails the test.
inline nlohmann::json json_of(const ProgramResult& result) { return nlohmann::json::parse(result.out); }

inline bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

inline const std::string kTinyExperiment = kTinyTables + "[train]\nsteps = 20\nbatch = 4\nmicro_batches = 2\n";

}  // namespace moelab::test
