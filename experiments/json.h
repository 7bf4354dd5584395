// JSON whose keys keep the order in which they were written: what the commands print.
#pragma once

#include <nlohmann/json_fwd.hpp>

namespace moelab {

using Json = nlohmann::ordered_json;

}  // namespace moelab
