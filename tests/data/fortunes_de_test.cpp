#include "tests/data/data_support.h"

#include <catch2/catch_test_macros.hpp>

using namespace moelab;
using namespace moelab::data_tests;

TEST_CASE("the prepared German sayings are the known text, and a missing one names its remedy") {
  const DatasetEntry& fortunes = Registry<DatasetEntry>::instance().find("fortunes_de");
  {
    const ScratchFolder folder = scratch();
    const Environment cache("MOELAB_CACHE", folder.path());
    const Failure missing = failure_of([] { make("fortunes_de", 16); });
    CHECK(missing.code == ExitCode::kData);
    CHECK((missing.says("moelab data prepare fortunes_de") && missing.one_line()));
  }
  const Failure failure = failure_of([&] { fortunes.prepare(); });
  if (failure.code == ExitCode::kData) SKIP("the text cannot be prepared here: " + failure.message);
  const auto data = make("fortunes_de", 256);
  CHECK(data->train_bytes().size() + data->validation_bytes().size() == 2954694);
  const std::string start(data->train_bytes().begin(), data->train_bytes().begin() + 70);
  CHECK(start == "Ein Mathematikprofessor trägt sein Fahrrad über den Universitätspla");
}
