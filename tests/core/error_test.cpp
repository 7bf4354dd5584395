#include "core/error.h"

#include <catch2/catch_test_macros.hpp>

#include <string>
#include <vector>

using namespace moelab;

TEST_CASE("edit distance counts insertions, deletions and substitutions") {
  CHECK(edit_distance("router", "router") == 0);
  CHECK(edit_distance("rooter", "router") == 1);
  CHECK(edit_distance("kitten", "sitting") == 3);
  CHECK(edit_distance("", "abc") == 3);
}

TEST_CASE("a slip finds its name, a stranger finds none") {
  const std::vector<std::string> names{"switch", "gshard", "noisy_topk"};
  CHECK(nearest_name("swich", names) == "switch");
  CHECK(nearest_name("noisy_topp", names) == "noisy_topk");
  CHECK(nearest_name("zebra_crossing", names).empty());
  CHECK(did_you_mean("gsard", names) == ", did you mean 'gshard'?");
}
