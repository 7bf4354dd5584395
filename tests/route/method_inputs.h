// What the experiment file and the input file of a router say whose oracle has a file of its own: its options as they stand in
// Layer::options, its parameters, buffers, ids and draws.
#pragma once

#include "oracle.h"

#include <random>

namespace moelab::testing {

// key = word; numbers and truth values bare, other words in quotes.
std::string toml_line(const std::string& key, const std::string& word);

bool has_own_oracle(const oracle::Layer& layer);
std::string method_keys(const oracle::Layer& layer);  // of [moe.router]

// `arrays` holds x, the experts, and router.weight [E,D] unless the router has none of this shape.
void add_method_inputs(const oracle::Layer& layer, std::mt19937_64& random, oracle::Arrays& arrays);

}  // namespace moelab::testing
