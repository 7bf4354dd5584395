// Definitions of Registry's members. Included only by the one .cpp per kind of plugin that says
//
//   template class moelab::Registry<RouterEntry>;
//
// so that each table exists once, in the shared library.
#pragma once

#include "core/registry.h"

#include <algorithm>
#include <mutex>
#include <string>
#include <vector>

namespace moelab {

template <class Entry>
Registry<Entry>& Registry<Entry>::instance() {
  static Registry registry;
  return registry;
}

template <class Entry>
const std::vector<Entry>& Registry<Entry>::all() {
  static std::mutex sorting;  // ranks may be threads, and may all come here first
  const std::lock_guard<std::mutex> lock(sorting);
  if (sorted_ == entries_.size()) return entries_;
  const auto by_name = [](const Entry& a, const Entry& b) { return a.name < b.name; };
  const auto same_name = [](const Entry& a, const Entry& b) { return a.name == b.name; };
  std::stable_sort(entries_.begin(), entries_.end(), by_name);
  const auto twin = std::adjacent_find(entries_.begin(), entries_.end(), same_name);
  if (twin != entries_.end()) {
    usage_error("two plugins are named '" + twin->name + "': " + twin->where.file_name() + " and " +
                (twin + 1)->where.file_name() + "; rename one");
  }
  sorted_ = entries_.size();
  return entries_;
}

template <class Entry>
const Entry& Registry<Entry>::find(const std::string& name) {
  std::vector<std::string> names;
  for (const Entry& entry : all()) {
    if (entry.name == name) return entry;
    names.push_back(entry.name);
  }
  std::string known;
  for (const std::string& other : names) known += (known.empty() ? "" : ", ") + other;
  const std::string hint = did_you_mean(name, names);
  usage_error("nothing is named '" + name + "'" + (hint.empty() ? ";" : hint) + " registered: " + known);
}

template <class Entry>
bool Registry<Entry>::contains(const std::string& name) {
  const std::vector<Entry>& entries = all();
  return std::any_of(entries.begin(), entries.end(), [&](const Entry& entry) { return entry.name == name; });
}

}  // namespace moelab
