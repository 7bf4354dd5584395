// Debian packages as sources of data, fetched and unpacked without root and without installing anything.
#pragma once

#include <string>
#include <vector>

namespace moelab {

// Downloads the packages and unpacks them below `folder`. `data` names the data set in messages. Error(kData) says what to do.
void unpack_debian_packages(const std::string& data, const std::vector<std::string>& packages, const std::string& folder);

}  // namespace moelab
