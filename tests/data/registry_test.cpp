#include "core/registry_impl.h"
#include "tests/data/data_support.h"

#include <catch2/catch_test_macros.hpp>

#include <source_location>

using namespace moelab;
using namespace moelab::data_tests;

namespace {

struct ToyEntry {
  std::string name;
  std::source_location where = std::source_location::current();
};

}  // namespace

TEST_CASE("the registry lists the data sets in order of their names") {
  std::vector<std::string> names;
  for (const DatasetEntry& entry : Registry<DatasetEntry>::instance().all()) names.push_back(entry.name);
  CHECK(std::is_sorted(names.begin(), names.end()));
  for (const char* name : {"bytes", "clusters", "fashion_mnist", "fortunes_de", "kjv", "markov"})
    CHECK(Registry<DatasetEntry>::instance().contains(name));
  CHECK_FALSE(Registry<DatasetEntry>::instance().contains("bible"));
}

TEST_CASE("an unknown name is refused with the nearest one and the whole list") {
  const Failure failure = failure_of([] { make_dataset("markow", {}); });
  CHECK(failure.code == ExitCode::kUsage);
  CHECK(failure.says("did you mean 'markov'?"));
  CHECK(failure.says("bytes, clusters, fashion_mnist, fortunes_de, kjv, markov"));
}

TEST_CASE("two entries of one name are reported at first use with both files, not before") {
  Registry<ToyEntry> registry;
  registry.add({.name = "twin"});
  registry.add({.name = "other"});
  registry.add({.name = "twin"});
  for (int attempt = 0; attempt < 2; ++attempt) {
    const Failure failure = failure_of([&] { registry.find("other"); });
    CHECK(failure.says("'twin'"));
    const size_t first = failure.message.find("registry_test.cpp");
    CHECK(first != std::string::npos);
    CHECK(failure.message.find("registry_test.cpp", first + 1) != std::string::npos);
  }
}

TEST_CASE("entries that come late are found in order") {
  Registry<ToyEntry> registry;
  registry.add({.name = "m"});
  CHECK(registry.find("m").name == "m");
  registry.add({.name = "a"});
  CHECK(registry.all()[0].name == "a");
  CHECK(registry.contains("m"));
}
