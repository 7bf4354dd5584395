// The experiment that tests of the program run: a model of a few thousand parameters on generated data, without its [train].
#pragma once

#include <string>

namespace moelab::test {

inline const std::string kTinyTables = R"(
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
)";

}  // namespace moelab::test
