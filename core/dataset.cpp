#include "core/dataset.h"

#include "core/registry_impl.h"

#include <ATen/core/Tensor.h>

#include <limits>

namespace moelab {

template class Registry<DatasetEntry>;

namespace {

const std::vector<uint8_t> kNoBytes;

}  // namespace

Dataset::~Dataset() = default;
double Dataset::known_entropy_bits() const { return std::numeric_limits<double>::quiet_NaN(); }
double Dataset::bytes_of(const Tensor&) const { return std::numeric_limits<double>::quiet_NaN(); }
std::string Dataset::text_of(const std::vector<int64_t>&) const { return {}; }
const std::vector<uint8_t>& Dataset::train_bytes() const { return kNoBytes; }
const std::vector<uint8_t>& Dataset::validation_bytes() const { return kNoBytes; }
std::vector<uint16_t> Dataset::train_tokens() const { return {}; }
std::vector<uint16_t> Dataset::validation_tokens() const { return {}; }
std::string Dataset::tokenizer() const { return {}; }
std::string Dataset::fingerprint() const { return {}; }

std::shared_ptr<const Dataset> make_dataset(const std::string& name, const DatasetSpec& spec) {
  const DatasetEntry& entry = Registry<DatasetEntry>::instance().find(name);
  if (spec.context < 1 && entry.holds == DataKind::kTokens)
    usage_error("a context of " + std::to_string(spec.context) + " tokens is too short; take 1 or more");
  return entry.make(spec);
}

}  // namespace moelab
