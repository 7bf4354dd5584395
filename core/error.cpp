#include "core/error.h"

#include <algorithm>
#include <numeric>
#include <vector>

namespace moelab {

Error::Error(ExitCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
Error::~Error() = default;

void usage_error(const std::string& message) { throw Error(ExitCode::kUsage, message); }
void diverged_error(const std::string& message) { throw Error(ExitCode::kDiverged, message); }
void data_error(const std::string& message) { throw Error(ExitCode::kData, message); }

std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

void check_invariant(bool holds, const std::string& message) {
  if (!holds) throw Error(ExitCode::kBug, "broken invariant: " + message);
}

int edit_distance(const std::string& a, const std::string& b) {
  std::vector<int> row(b.size() + 1);
  std::iota(row.begin(), row.end(), 0);
  for (size_t i = 1; i <= a.size(); ++i) {
    int diagonal = row[0];
    row[0] = static_cast<int>(i);
    for (size_t j = 1; j <= b.size(); ++j) {
      const int substitute = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, substitute});
    }
  }
  return row.back();
}

}  // namespace moelab
