// Routers that break one rule each, registered in this test binary alone, and the property that has to find each of them.
#pragma once

#include <string>
#include <vector>

namespace moelab {

struct Mutant {
  std::string name;      // mutant_…
  std::string property;  // that kills it
};
const std::vector<Mutant>& mutants();

// Routers that break nothing, though they do what mutants only pretend not to do: control_….
const std::vector<std::string>& controls();

}  // namespace moelab
