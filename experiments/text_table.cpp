#include "experiments/text_table.h"

#include <algorithm>

namespace moelab {
namespace {

// Characters, not bytes: continuation bytes of UTF-8 take no column.
size_t columns_of(const std::string& text) {
  return std::count_if(text.begin(), text.end(), [](unsigned char c) { return (c & 0xC0) != 0x80; });
}

std::vector<size_t> widths_of(const TextRows& rows) {
  std::vector<size_t> widths;
  for (const auto& row : rows) {
    widths.resize(std::max(widths.size(), row.size()), 0);
    for (size_t c = 0; c < row.size(); ++c) widths[c] = std::max(widths[c], columns_of(row[c]));
  }
  return widths;
}

std::string escaped_cell(std::string text) {
  for (size_t at = 0; (at = text.find('|', at)) != std::string::npos; at += 2) text.insert(at, "\\");
  return text;
}

std::string markdown_row(const std::vector<std::string>& row) {
  std::string line = "|";
  for (const std::string& cell : row) line += " " + escaped_cell(cell) + " |";
  return line + "\n";
}

}  // namespace

std::string aligned_text(const TextRows& rows, int indent) {
  const std::vector<size_t> widths = widths_of(rows);
  std::string text;
  for (const auto& row : rows) {
    std::string line(indent, ' ');
    for (size_t c = 0; c < row.size(); ++c) {
      line += row[c];
      if (c + 1 < row.size()) line += std::string(widths[c] - columns_of(row[c]) + 2, ' ');
    }
    text += line.substr(0, line.find_last_not_of(' ') + 1) + "\n";
  }
  return text;
}

std::string markdown_table(const TextRows& rows) {
  std::string text = markdown_row(rows.front());
  text += markdown_row(std::vector<std::string>(rows.front().size(), "---"));
  for (size_t r = 1; r < rows.size(); ++r) text += markdown_row(rows[r]);
  return text;
}

}  // namespace moelab
