#include "experiments/generated.h"

#include "core/error.h"
#include "experiments/catalogue.h"
#include "experiments/expert_compat.h"
#include "experiments/text_table.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <filesystem>

namespace moelab {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kGeneratedStart = "<!-- generated: ";
constexpr std::string_view kGeneratedEnd = "<!-- end -->";

std::string as_code(const std::string& text) { return "`" + text + "`"; }

TextRows router_rows() {
  TextRows rows{{"router", "method", "paper", "facts"}};
  for (const Json& r : find_kind("routers").list())
    rows.push_back({as_code(r.at("name")), r.at("title"), r.at("citation"),
                    fmt::format("{}", fmt::join(router_facts_in_words(r.at("facts")), "; "))});
  return rows;
}

TextRows metric_rows() {
  TextRows rows{{"metric", "equation", "range", "meaning"}};
  for (const Json& m : find_kind("metrics").list())
    rows.push_back(
        {as_code(m.at("name")), metric_details(m.at("name")).at("equation"), m.at("facts").at("range"), m.at("title")});
  return rows;
}

TextRows loss_rows() {
  TextRows rows{{"loss", "value", "paper"}};
  for (const Json& l : find_kind("losses").list())
    rows.push_back({as_code(l.at("name")), loss_details(l.at("name")).at("equation"), l.at("citation")});
  return rows;
}

TextRows model_rows() {
  TextRows rows{{"model", "what", "reads", "causal"}};
  for (const Json& m : find_kind("models").list())
    rows.push_back(
        {as_code(m.at("name")), m.at("title"), m.at("facts").at("reads"), m.at("facts").at("causal").get<bool>() ? "yes" : "no"});
  return rows;
}

TextRows plain_rows(const std::string& kind) {
  TextRows rows{{"name", "what", "source"}};
  for (const Json& entry : find_kind(kind).list())
    rows.push_back({as_code(entry.at("name")), entry.at("title"), entry.at("citation")});
  return rows;
}

std::string generated_table(const std::string& kind) {
  if (kind == "routers") return markdown_table(router_rows());
  if (kind == "experts and routers") return compat_markdown();
  if (kind == "metrics") return markdown_table(metric_rows());
  if (kind == "models") return markdown_table(model_rows());
  return markdown_table(kind == "losses" ? loss_rows() : plain_rows(kind));
}

}  // namespace

std::string with_generated_tables(const std::string& text, const std::string& path) {
  std::string out;
  size_t done = 0;
  for (size_t at = 0; (at = text.find(kGeneratedStart, done)) != std::string::npos;) {
    const size_t name = at + kGeneratedStart.size(), close = text.find(" -->", name), end = text.find(kGeneratedEnd, name);
    if (close == std::string::npos || end == std::string::npos)
      usage_error(fmt::format("{}: a '{}…' without '{}'", path, kGeneratedStart, kGeneratedEnd));
    out += text.substr(done, close + 4 - done) + "\n" + generated_table(text.substr(name, close - name));
    done = end;
  }
  return out + text.substr(done);
}

std::vector<std::string> readme_files(const std::string& root) {
  std::vector<std::string> files;
  if (fs::exists(root + "/README.md")) files.push_back(root + "/README.md");
  for (const fs::directory_entry& entry : fs::directory_iterator(root))
    if (fs::exists(entry.path() / "README.md")) files.push_back((entry.path() / "README.md").string());
  std::sort(files.begin(), files.end());
  return files;
}

}  // namespace moelab
