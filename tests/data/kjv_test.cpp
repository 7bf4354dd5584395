#include "datasets/process.h"
#include "tests/data/data_support.h"

#include <catch2/catch_test_macros.hpp>

using namespace moelab;
using namespace moelab::data_tests;

namespace {

const DatasetEntry& kjv() { return Registry<DatasetEntry>::instance().find("kjv"); }

size_t entries_below(const std::string& folder) {
  const std::filesystem::recursive_directory_iterator begin(folder);
  return std::distance(begin, std::filesystem::recursive_directory_iterator{});
}

}  // namespace

TEST_CASE("the prepared Bible is the known text, split at its last twentieth") {
  const Failure failure = failure_of([] { kjv().prepare(); });
  if (failure.code == ExitCode::kData) SKIP("the Bible cannot be prepared here: " + failure.message);
  REQUIRE(failure.code == ExitCode::kDone);
  CHECK(kjv().verify().find("4298239 bytes") != std::string::npos);
  CHECK(kjv().prepare().find("already prepared") != std::string::npos);
  const auto data = make("kjv", 256);
  CHECK(data->train_bytes().size() == 4083327);  // 4298239 - round(0.05·4298239 = 214911.95)
  CHECK(data->validation_bytes().size() == 214912);
  const std::string start(data->train_bytes().begin(), data->train_bytes().begin() + 80);
  CHECK(start.find("Genesis 1\n\n  1 In the beginning God created the heaven and the earth.\n") == 1);
}

TEST_CASE("a Bible that is missing or damaged is refused with the remedy") {
  const ScratchFolder folder = scratch();
  const Environment cache("MOELAB_CACHE", folder.path());
  for (const std::string& content : {std::string(), std::string("In the beginning"), std::string(4298239, 'x')}) {
    if (!content.empty()) write_text(folder.path() + "/data/kjv.txt", content);
    for (const Failure& failure : {failure_of([] { make("kjv", 16); }), failure_of([] { kjv().verify(); })}) {
      INFO(failure.message);
      CHECK(failure.code == ExitCode::kData);
      CHECK(failure.says("moelab data prepare kjv"));
      CHECK(failure.one_line());
    }
  }
}

TEST_CASE("a preparation that fails says so in one line and leaves nothing behind") {
  const ScratchFolder folder = scratch();
  const Environment cache("MOELAB_CACHE", folder.path());
  const Environment path("PATH", folder.path());  // no program can be found
  const Failure failure = failure_of([] { kjv().prepare(); });
  INFO(failure.message);
  CHECK(failure.code == ExitCode::kData);
  CHECK(failure.one_line());
  CHECK(entries_below(folder.path()) == 1);  // the empty folder `data`
}

TEST_CASE("the cache follows MOELAB_CACHE, then XDG_CACHE_HOME, then HOME") {
  const Environment home("HOME", "/somewhere"), shared("XDG_CACHE_HOME", "/shared");
  {
    const Environment own("MOELAB_CACHE", "/own");
    CHECK(cache_folder() == "/own");
  }
  const Environment own("MOELAB_CACHE", "");
  CHECK(cache_folder() == "/shared/moelab");
  const Environment no_shared("XDG_CACHE_HOME", "");
  CHECK(cache_folder() == "/somewhere/.cache/moelab");
  const Environment no_home("HOME", "");
  CHECK(failure_of(cache_folder).says("MOELAB_CACHE"));
}

TEST_CASE("a started program gets its arguments untouched and reports how it ended") {
  CHECK(run_process({"printf", "%s", "a b; $HOME `id` \"'"}).output == "a b; $HOME `id` \"'");
  const ProcessResult spoken = run_process({"sh", "-c", "echo out; echo first >&2; echo last >&2; exit 3"});
  CHECK(spoken.status == 3);
  CHECK(spoken.output == "out\n");
  CHECK(last_words(spoken) == "last");
  CHECK(run_process({"sh", "-c", "kill -9 $$"}).status == 128 + 9);
  CHECK(run_process({"no-such-program-anywhere"}).status == 127);
  CHECK(run_process({"pwd"}, "/").output == "/\n");
  CHECK(last_words({.status = 4, .output = "", .errors = "\n"}) == "exit status 4");
}
