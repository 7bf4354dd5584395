// The three files that `moelab new router NAME` writes.
#pragma once

#include <string>
#include <vector>

namespace moelab {

struct SkeletonFile {
  std::string path;  // from the root of the checkout
  std::string text;
};

std::vector<SkeletonFile> router_skeleton(const std::string& name);

}  // namespace moelab
