#include "core/io/manifest.h"

#include "core/error.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

namespace moelab {
namespace {

using nlohmann::json;

std::string manifest_path(const std::string& folder) { return folder + "/manifest.json"; }

json manifest_body(const Manifest& manifest) {
  json files = json::object();
  for (const auto& [name, digest] : manifest.files) files[name] = {{"size", digest.size}, {"xxh3", digest.xxh3}};
  return {{"schema", kManifestSchema}, {"step", manifest.step}, {"files", files}};
}

Manifest parse_manifest(json root) {
  const std::string own_hash = root.at("xxh3");
  root.erase("xxh3");
  if (own_hash != xxh3_hex(root.dump())) data_error("its hash differs");
  const int64_t schema = root.at("schema");
  if (schema != kManifestSchema) data_error(fmt::format("schema {}, this program reads {}", schema, kManifestSchema));
  Manifest manifest{root.at("step"), {}};
  for (const auto& [name, digest] : root.at("files").items()) {
    if (name.find('/') != std::string::npos) data_error("file name '" + name + "' leaves the folder");
    manifest.files[name] = {digest.at("size"), digest.at("xxh3")};
  }
  return manifest;
}

}  // namespace

void write_manifest(const std::string& folder, const Manifest& manifest) {
  json root = manifest_body(manifest);
  root["xxh3"] = xxh3_hex(root.dump());
  write_file(manifest_path(folder), root.dump(2) + "\n");
}

Manifest read_manifest(const std::string& folder) {
  const std::string path = manifest_path(folder);
  const std::string text = read_file(path);
  try {
    return parse_manifest(json::parse(text));
  } catch (const json::exception&) {
    data_error(fmt::format("'{}': damaged: not the JSON of a manifest", path));
  } catch (const Error& error) {
    data_error(fmt::format("'{}': damaged: {}", path, error.what()));
  }
}

std::string damage_of(const std::string& folder, const std::string& name, const FileDigest& expected) {
  const std::string path = folder + "/" + name;
  try {
    const int64_t size = File(path, File::Mode::kRead).size();
    if (size != expected.size) return fmt::format("'{}': damaged: {} bytes, the manifest says {}", path, size, expected.size);
    if (digest_file(path) != expected) return fmt::format("'{}': damaged: its hash differs from the manifest's", path);
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

void verify_files(const std::string& folder, const Manifest& manifest) {
  for (const auto& [name, digest] : manifest.files) {
    const std::string damage = damage_of(folder, name, digest);
    if (!damage.empty()) data_error(damage);
  }
}

}  // namespace moelab
