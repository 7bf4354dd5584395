// The three files that `moelab new router NAME` and `moelab new expert NAME` write.
#pragma once

#include <string>
#include <vector>

namespace moelab {

struct SkeletonFile {
  std::string path;  // from the root of the checkout
  std::string text;
};

// @NAME@ becomes my_router, @CLASS@ becomes MyRouter.
std::string filled_in(std::string text, const std::string& name);

std::vector<SkeletonFile> router_skeleton(const std::string& name);
std::vector<SkeletonFile> expert_skeleton(const std::string& name);

}  // namespace moelab
