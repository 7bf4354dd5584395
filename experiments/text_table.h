// Rows of cells as aligned text for a terminal, or as a table for a README.
#pragma once

#include <string>
#include <vector>

namespace moelab {

using TextRows = std::vector<std::vector<std::string>>;

// Columns two spaces apart, each line indented; the last column is not padded.
std::string aligned_text(const TextRows& rows, int indent = 0);

// GitHub's table; the first row is the head.
std::string markdown_table(const TextRows& rows);

}  // namespace moelab
