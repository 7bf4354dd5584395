#include "core/io/files.h"

#include "io_support.h"

#include <catch2/catch_test_macros.hpp>
#include <signal.h>

#include <string>

using namespace moelab;
using namespace moelab::io_test;

TEST_CASE("the hash is XXH3-128 as its authors print it, in one piece or in several") {
  CHECK(xxh3_hex("") == "99aa06d3014798d86001c324468d497f");
  HashStream stream;
  stream.add("mixture of ");
  stream.add("experts");
  CHECK(stream.hex() == xxh3_hex("mixture of experts"));
}

TEST_CASE("a file's digest is that of its bytes, across the pieces it is read in") {
  const TempFolder folder;
  const std::string bytes((1 << 20) + 17, 'x');
  const FileDigest written = write_file(folder / "big", bytes);
  CHECK(written == FileDigest{(1 << 20) + 17, xxh3_hex(bytes)});
  CHECK(digest_file(folder / "big") == written);
  CHECK(read_file(folder / "big") == bytes);
}

TEST_CASE("an atomic write replaces the old bytes and leaves no temporary file") {
  const TempFolder folder;
  write_file_atomically(folder / "a", "old and long");
  write_file_atomically(folder / "a", "new");
  CHECK(bytes_of(folder / "a") == "new");
  CHECK_FALSE(std::filesystem::exists(folder / "a.tmp"));
}

TEST_CASE("a failing file operation says which path and why") {
  const TempFolder folder;
  put_bytes(folder / "plain", "x");
  CHECK(error_of([&] { read_file(folder / "none"); }) ==
        "5: cannot read '" + (folder / "none") + "': No such file or directory");
  CHECK(error_of([&] { read_file(folder.path()); }) == "5: cannot read '" + folder.path() + "': not a regular file");
  CHECK(error_of([&] { write_file("/dev/full", "x"); }) == "5: cannot write '/dev/full': No space left on device");
  CHECK(error_of([&] { write_file_atomically(folder / "plain/a", "x"); }) ==
        "5: cannot write '" + (folder / "plain/a.tmp") + "': Not a directory");
  CHECK(contains(error_of([&] { make_folders(folder / "plain/a"); }), folder / "plain/a"));
}

TEST_CASE("a folder locked by one process is refused to a second, with the owner's number") {
  const TempFolder folder;
  const RunLock lock(folder.path());
  const std::string refusal = error_in_child([&] { RunLock second(folder.path()); });
  CHECK(refusal == "2: '" + folder.path() + "' is in use by process " + std::to_string(getpid()) +
                       ": wait until it ends, or stop it");
  CHECK(error_of([&] { RunLock second(folder.path()); }) == refusal);
}

TEST_CASE("a lock ends with its scope and with a killed owner") {
  const TempFolder folder;
  { const RunLock lock(folder.path()); }
  const pid_t owner = fork();
  if (owner == 0) {
    const RunLock lock(folder.path());
    put_bytes(folder / "locked", "");
    for (;;) pause();
  }
  while (!std::filesystem::exists(folder / "locked")) usleep(1000);
  CHECK(contains(error_of([&] { RunLock second(folder.path()); }), "process " + std::to_string(owner)));
  kill(owner, SIGKILL);
  waitpid(owner, nullptr, 0);
  CHECK(error_of([&] { RunLock second(folder.path()); }).empty());
}

TEST_CASE("a lock in a folder that is not there is a data error") {
  CHECK(contains(error_of([] { RunLock lock("/nonexistent-folder"); }), "5: cannot write '/nonexistent-folder/.lock'"));
}
