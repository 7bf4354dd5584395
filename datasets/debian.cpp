#include "datasets/debian.h"

#include "core/error.h"
#include "datasets/process.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <filesystem>

namespace moelab {
namespace {

void download_packages(const std::string& data, const std::vector<std::string>& packages, const std::string& folder) {
  std::vector<std::string> command{"apt-get", "-q", "-o", "APT::Sandbox::User=root", "download"};
  command.insert(command.end(), packages.begin(), packages.end());
  const ProcessResult result = run_process(command, folder);
  if (result.status == 127)
    data_error(fmt::format("data set '{}' comes from Debian packages, which needs apt-get: {}", data, last_words(result)));
  if (result.status != 0)
    data_error(fmt::format("cannot download {} ({}); run `apt-get update` as root, see that the network is there, and try again",
                           fmt::join(packages, " and "), last_words(result)));
}

}  // namespace

void unpack_debian_packages(const std::string& data, const std::vector<std::string>& packages, const std::string& folder) {
  download_packages(data, packages, folder);
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    if (entry.path().extension() != ".deb") continue;
    const ProcessResult result = run_process({"dpkg-deb", "-x", entry.path().string(), folder});
    if (result.status != 0) data_error(fmt::format("dpkg-deb cannot unpack {}: {}", entry.path().string(), last_words(result)));
  }
}

}  // namespace moelab
