// Tables that are generated into README files, between `<!-- generated: KIND -->` and `<!-- end -->`.
#pragma once

#include <string>
#include <vector>

namespace moelab {

// `text` with every marked table made anew. `path` is for messages: an unknown KIND or a missing end is Error(kUsage).
std::string with_generated_tables(const std::string& text, const std::string& path);

// README.md of `root` and of the folders right below it, sorted.
std::vector<std::string> readme_files(const std::string& root);

}  // namespace moelab
