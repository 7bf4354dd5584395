// What the tests of the commands share.
#pragma once

#include "tests/support/program.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <string>
#include <vector>

namespace moelab::test {

inline ProgramResult moelab_in(const std::string& folder, const std::vector<std::string>& arguments) {
  return run_program(MOELAB_PROGRAM, arguments, folder);
}

inline ProgramResult moelab_run(const std::vector<std::string>& arguments) { return moelab_in("", arguments); }

// The one JSON document on stdout; a parse error fails the test.
inline nlohmann::json json_of(const ProgramResult& result) { return nlohmann::json::parse(result.out); }

inline bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

// A model of a few thousand parameters on generated data.
inline const char* const kTinyExperiment = R"(
[model]
layers = 2
width = 16
heads = 2
context = 8
[moe]
experts = 4
[moe.router]
name = "switch"
[moe.expert]
width = 16
[data]
name = "markov"
validation_documents = 4
[train]
steps = 20
batch = 4
micro_batches = 2
)";

}  // namespace moelab::test
