#include "core/io/safetensors.h"

#include "core/error.h"
#include "core/io/jsonl.h"

#include <ATen/ops/empty.h>
#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <nlohmann/json.hpp>
#include <set>
#include <string_view>
#include <utility>

namespace moelab {
namespace {

using nlohmann::json;

static_assert(std::endian::native == std::endian::little, "the format is little endian");

constexpr int64_t kLengthBytes = 8;
constexpr int64_t kMaxHeaderBytes = 100'000'000;  // the reference reader's limit
constexpr int64_t kAlignment = 64;
constexpr size_t kMaxDimensions = 64;
constexpr const char* kMetadataKey = "__metadata__";

struct DtypeWord {
  const char* word;
  at::ScalarType type;
};
constexpr DtypeWord kDtypeWords[] = {{"BOOL", at::kBool}, {"U8", at::kByte},       {"I8", at::kChar},
                                     {"I16", at::kShort}, {"I32", at::kInt},       {"I64", at::kLong},
                                     {"F16", at::kHalf},  {"BF16", at::kBFloat16}, {"F32", at::kFloat},
                                     {"F64", at::kDouble}};

const DtypeWord* find_dtype(std::string_view word) {
  const auto* found = std::find_if(std::begin(kDtypeWords), std::end(kDtypeWords),
                                   [&](const DtypeWord& known) { return known.word == word; });
  return found == std::end(kDtypeWords) ? nullptr : found;
}

const DtypeWord* find_dtype(at::ScalarType type) {
  const auto* found = std::find_if(std::begin(kDtypeWords), std::end(kDtypeWords),
                                   [&](const DtypeWord& known) { return known.type == type; });
  return found == std::end(kDtypeWords) ? nullptr : found;
}

// Turns the header's text into entries that are known to fit the file.
class HeaderParser {
 public:
  HeaderParser(const std::string& path, int64_t data_bytes) : path_(path), data_bytes_(data_bytes) {}

  SafetensorsHeader parse(const std::string& text) {
    const json root = parse_json(text);
    SafetensorsHeader header;
    for (const std::string& name : names_) {
      if (name == kMetadataKey) {
        header.metadata = metadata(root[name]);
      } else {
        header.tensors.push_back(entry(name, root[name]));
      }
    }
    std::stable_sort(header.tensors.begin(), header.tensors.end(), [](const TensorEntry& a, const TensorEntry& b) {
      return std::pair(a.offset, a.bytes) < std::pair(b.offset, b.bytes);
    });
    check_cover(header.tensors);
    return header;
  }

  [[noreturn]] void fail(const std::string& what) const { data_error(fmt::format("'{}': {}", path_, what)); }

 private:
  // Keeps the names in the header's order, and refuses what json::parse would swallow: a key given twice, and nesting deep
  // enough to exhaust memory.
  json parse_json(const std::string& text) {
    if (text.empty() || text[0] != '{') fail("damaged: the header does not begin with '{'");
    std::vector<std::set<std::string>> keys;
    const auto watch = [&](int depth, json::parse_event_t event, json& value) {
      using Event = json::parse_event_t;
      const bool opens = event == Event::object_start || event == Event::array_start;
      if (opens && depth > 2) fail("damaged: the header is nested too deeply");
      if (event == Event::object_start) keys.emplace_back();
      if (event == Event::object_end) keys.pop_back();
      if (event == Event::key) note_key(keys, value.get<std::string>());
      return true;
    };
    try {
      return json::parse(text, watch);
    } catch (const json::parse_error& error) {
      fail(fmt::format("damaged: the header is not JSON (byte {})", error.byte));
    }
  }

  void note_key(std::vector<std::set<std::string>>& keys, const std::string& key) {
    if (!keys.back().insert(key).second) fail("the header names '" + key + "' twice");
    if (keys.size() == 1) names_.push_back(key);
  }

  Metadata metadata(const json& value) const {
    if (!value.is_object()) fail("the metadata are not an object");
    Metadata metadata;
    for (const auto& [key, text] : value.items()) {
      if (!text.is_string()) fail("metadata '" + key + "' is not a string");
      metadata[key] = text.get<std::string>();
    }
    return metadata;
  }

  TensorEntry entry(const std::string& name, const json& value) const {
    const std::string place = "tensor '" + name + "'";
    if (!value.is_object() || !value.contains("dtype") || !value["dtype"].is_string()) fail(place + " has no dtype");
    TensorEntry entry{name, value["dtype"], unsigned_list(place, value, "shape"), 0, 0};
    const DtypeWord* dtype = find_dtype(entry.dtype);
    if (dtype == nullptr) fail(place + " has unknown dtype '" + entry.dtype + "'");
    const std::vector<int64_t> offsets = unsigned_list(place, value, "data_offsets");
    if (offsets.size() != 2 || offsets[0] > offsets[1]) fail(place + " has bad data_offsets");
    if (offsets[1] > data_bytes_) {
      fail(fmt::format("truncated: {} ends at byte {} of the data, the file holds {}", place, offsets[1], data_bytes_));
    }
    entry.offset = offsets[0];
    entry.bytes = offsets[1] - offsets[0];
    check_length(place, entry, static_cast<int64_t>(elementSize(dtype->type)));
    return entry;
  }

  std::vector<int64_t> unsigned_list(const std::string& place, const json& value, const char* key) const {
    const auto found = value.find(key);
    if (found == value.end() || !found->is_array()) fail(place + " has no " + key);
    if (found->size() > kMaxDimensions) fail(fmt::format("{} has {} entries in {}", place, found->size(), key));
    std::vector<int64_t> list;
    for (const json& element : *found) {
      if (!element.is_number_unsigned() || element.get<uint64_t>() > INT64_MAX) fail(place + " has a bad number in " + key);
      list.push_back(element.get<int64_t>());
    }
    return list;
  }

  void check_length(const std::string& place, const TensorEntry& entry, int64_t element_bytes) const {
    // Sizes with zeros taken as one must fit too: strides are computed from them.
    int64_t bytes = element_bytes;
    bool empty = false;
    for (const int64_t size : entry.shape) {
      if (__builtin_mul_overflow(bytes, std::max<int64_t>(size, 1), &bytes)) fail(place + " has a shape that overflows");
      empty = empty || size == 0;
    }
    if (empty) bytes = 0;
    if (bytes == entry.bytes) return;
    fail(fmt::format("{} has {} bytes of data, its shape and dtype {} need {}", place, entry.bytes, entry.dtype, bytes));
  }

  // The tensors, in the order of their bytes, must tile the data.
  void check_cover(const std::vector<TensorEntry>& tensors) const {
    int64_t end = 0;
    for (const TensorEntry& entry : tensors) {
      if (entry.offset < end) fail("tensor '" + entry.name + "' overlaps the one before it");
      if (entry.offset > end) fail("gap in the data before tensor '" + entry.name + "'");
      end += entry.bytes;
    }
    if (end != data_bytes_) fail(fmt::format("{} bytes after the last tensor", data_bytes_ - end));
  }

  const std::string& path_;
  int64_t data_bytes_;
  std::vector<std::string> names_;
};

SafetensorsHeader read_header(const File& file) {
  const int64_t rest = file.size() - kLengthBytes;
  const HeaderParser without_data(file.path(), 0);
  if (rest < 0) without_data.fail("truncated: no header");
  uint64_t length = 0;
  file.read_at(0, &length, kLengthBytes);
  if (length > kMaxHeaderBytes) without_data.fail(fmt::format("damaged: a header of {} bytes (limit 100 MB)", length));
  const int64_t header_bytes = static_cast<int64_t>(length);
  if (header_bytes > rest) without_data.fail(fmt::format("truncated: a header of {} bytes, {} left", header_bytes, rest));
  std::string text(length, '\0');
  file.read_at(kLengthBytes, text.data(), header_bytes);
  SafetensorsHeader header = HeaderParser(file.path(), rest - header_bytes).parse(text);
  header.data_start = kLengthBytes + header_bytes;
  return header;
}

void check_bools(const Tensor& tensor, const std::string& path, const std::string& name) {
  const auto* bytes = static_cast<const unsigned char*>(tensor.const_data_ptr());
  if (std::any_of(bytes, bytes + tensor.numel(), [](unsigned char byte) { return byte > 1; })) {
    data_error(fmt::format("'{}': tensor '{}' has a BOOL that is neither 0 nor 1", path, name));
  }
}

Tensor read_tensor(const File& file, const TensorEntry& entry, int64_t data_start) {
  const at::ScalarType type = find_dtype(entry.dtype)->type;
  Tensor tensor = at::empty(entry.shape, at::TensorOptions().dtype(type));
  if (entry.bytes == 0) return tensor;
  file.read_at(data_start + entry.offset, tensor.mutable_data_ptr(), entry.bytes);
  if (type == at::kBool) check_bools(tensor, file.path(), entry.name);
  return tensor;
}

int64_t byte_count(const Tensor& tensor) { return tensor.numel() * static_cast<int64_t>(tensor.element_size()); }

std::string header_item(const std::string& path, const NamedTensor& named, int64_t begin) {
  const DtypeWord* dtype = find_dtype(named.tensor.scalar_type());
  if (dtype == nullptr) {
    data_error(fmt::format("cannot write '{}': tensor '{}' has dtype {}, which the format lacks", path, named.name,
                           toString(named.tensor.scalar_type())));
  }
  const json entry{{"dtype", dtype->word},
                   {"shape", named.tensor.sizes().vec()},
                   {"data_offsets", {begin, begin + byte_count(named.tensor)}}};
  return json(named.name).dump() + ":" + entry.dump();
}

// The JSON is put together from its items, because an ordered JSON object costs the square of the number of tensors.
std::string header_text(const std::string& path, const std::vector<NamedTensor>& tensors, const Metadata& metadata) {
  std::set<std::string> names{kMetadataKey};
  std::string text = "{";
  if (!metadata.empty()) text += json(kMetadataKey).dump() + ":" + json_text(metadata) + ",";
  int64_t begin = 0;
  for (const NamedTensor& named : tensors) {
    check_invariant(named.tensor.defined(), "tensor '" + named.name + "' to be saved is undefined");
    if (!names.insert(named.name).second) data_error(fmt::format("cannot write '{}': name '{}' twice", path, named.name));
    text += header_item(path, named, begin) + ",";
    begin += byte_count(named.tensor);
  }
  if (text.back() == ',') text.pop_back();
  text += "}";
  const int64_t unpadded = kLengthBytes + static_cast<int64_t>(text.size());
  text.append(static_cast<size_t>((kAlignment - unpadded % kAlignment) % kAlignment), ' ');
  return text;
}

}  // namespace

FileDigest write_safetensors(const std::string& path, const std::vector<NamedTensor>& tensors, const Metadata& metadata) {
  const std::string header = header_text(path, tensors, metadata);
  const uint64_t length = header.size();
  DigestedFile file(path);
  file.write({reinterpret_cast<const char*>(&length), sizeof(length)});
  file.write(header);
  for (const NamedTensor& named : tensors) {
    const Tensor plain = named.tensor.detach().cpu().contiguous();
    if (plain.numel() == 0) continue;
    file.write({static_cast<const char*>(plain.const_data_ptr()), static_cast<size_t>(byte_count(plain))});
  }
  return file.finish();
}

SafetensorsHeader read_safetensors_header(const std::string& path) { return read_header(File(path, File::Mode::kRead)); }

SafetensorsFile read_safetensors(const std::string& path) {
  const File file(path, File::Mode::kRead);
  SafetensorsHeader header = read_header(file);
  SafetensorsFile result;
  result.metadata = std::move(header.metadata);
  for (const TensorEntry& entry : header.tensors) {
    result.tensors.push_back({entry.name, read_tensor(file, entry, header.data_start)});
  }
  return result;
}

}  // namespace moelab
