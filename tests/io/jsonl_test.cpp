#include "core/io/jsonl.h"

#include "io_support.h"

#include <catch2/catch_test_macros.hpp>
#include <signal.h>
#include <sys/resource.h>

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>

using namespace moelab;
using namespace moelab::io_test;
using nlohmann::json;

TEST_CASE("records are one line each, appended to what is there, non-finite numbers as strings") {
  const TempFolder folder;
  const double infinity = std::numeric_limits<double>::infinity();
  JsonlWriter(folder / "m.jsonl").append({{"step", 1}, {"m", {{"a", std::nan("")}, {"b", infinity}}}});
  JsonlWriter(folder / "m.jsonl").append({{"step", 2}, {"m", {-infinity, 0.5}}});
  CHECK(bytes_of(folder / "m.jsonl") ==
        "{\"m\":{\"a\":\"nan\",\"b\":\"inf\"},\"step\":1}\n{\"m\":[\"-inf\",0.5],\"step\":2}\n");
}

TEST_CASE("every number comes back from its text, the non-finite ones too") {
  for (const double number : {0.1, -0.0, 1e-310, 1.7976931348623157e308, std::numeric_limits<double>::infinity(),
                              -std::numeric_limits<double>::infinity()}) {
    const double back = json_number(json::parse(json_text(number)));
    CHECK(back == number);
    CHECK(std::signbit(back) == std::signbit(number));
  }
  CHECK(std::isnan(json_number(json::parse(json_text(std::nan(""))))));
  CHECK(error_of([] { json_number("seven"); }) == "5: \"seven\" is not a number");
}

TEST_CASE("a record is in the file as soon as it is appended, and bytes that are no text do not stop it") {
  const TempFolder folder;
  JsonlWriter writer(folder / "m.jsonl");
  writer.append({{"name", "a\xff\nb"}});
  CHECK(bytes_of(folder / "m.jsonl") == "{\"name\":\"a\xEF\xBF\xBD\\nb\"}\n");
}

TEST_CASE("a full disk is a data error with the path") {
  JsonlWriter writer("/dev/full");
  CHECK(error_of([&] { writer.append({{"step", 1}}); }) == "5: cannot write '/dev/full': No space left on device");
}

TEST_CASE("a record that does not fit leaves no half line behind") {
  const TempFolder folder;
  const std::string error = error_in_child([&] {
    signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{20, 20};
    setrlimit(RLIMIT_FSIZE, &limit);
    JsonlWriter writer(folder / "m.jsonl");
    writer.append({{"step", 1}});
    writer.append({{"step", 2}});
  });
  CHECK(error == "5: cannot write '" + (folder / "m.jsonl") + "': File too large");
  CHECK(bytes_of(folder / "m.jsonl") == "{\"step\":1}\n");
}

TEST_CASE("resuming drops the records after the step and a torn last line, and keeps those without a step") {
  const TempFolder folder;
  const std::string path = folder / "m.jsonl";
  put_bytes(path, "{\"step\":1}\n{\"event\":\"x\"}\n{\"step\":2}\n{\"step\":3}\n{\"step\":2,\"m\":{\"lo");
  truncate_after_step(path, 2);
  CHECK(bytes_of(path) == "{\"step\":1}\n{\"event\":\"x\"}\n{\"step\":2}\n");
  truncate_after_step(path, 0);
  CHECK(bytes_of(path) == "{\"event\":\"x\"}\n");
  CHECK_FALSE(std::filesystem::exists(path + ".tmp"));
}

TEST_CASE("a last record that lacks only its line end is kept") {
  const TempFolder folder;
  put_bytes(folder / "m.jsonl", "{\"step\":1}\n{\"step\":2}");
  truncate_after_step(folder / "m.jsonl", 2);
  CHECK(bytes_of(folder / "m.jsonl") == "{\"step\":1}\n{\"step\":2}\n");
}

TEST_CASE("an absent or empty log needs no truncation, a damaged line within one is named") {
  const TempFolder folder;
  truncate_after_step(folder / "none.jsonl", 1);
  CHECK_FALSE(std::filesystem::exists(folder / "none.jsonl"));
  put_bytes(folder / "empty.jsonl", "");
  truncate_after_step(folder / "empty.jsonl", 1);
  CHECK(bytes_of(folder / "empty.jsonl").empty());
  put_bytes(folder / "bad.jsonl", "{\"step\":1}\n{\"st\n{\"step\":2}\n");
  CHECK(error_of([&] { truncate_after_step(folder / "bad.jsonl", 1); }) ==
        "5: '" + (folder / "bad.jsonl") + "', line 2: not a JSON object; delete this line, then resume again");
}
