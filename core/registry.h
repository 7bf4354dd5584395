// One registry per kind of plugin. An Entry is plain data in designated initialisers plus a factory:
//
//   struct RouterEntry { std::string name; ...; std::source_location where = std::source_location::current(); };
//   const Registration<RouterEntry> registration{{.name = "switch", ...}};
//
// The tables live out of line in the shared library (registry_impl.h): a header-inline table would split in two between the
// program and a plugin. A duplicate name is remembered and thrown at first use, never before main.
#pragma once

#include "core/error.h"

#include <string>
#include <vector>

namespace moelab {

template <class Entry>
class Registry {
 public:
  static Registry& instance();  // defined in registry_impl.h, instantiated once for each kind

  void add(Entry entry) { entries_.push_back(std::move(entry)); }

  // Sorted by name. Throws on a duplicate, naming both files.
  const std::vector<Entry>& all();

  // Throws Error(kUsage) naming the nearest registered name and listing all.
  const Entry& find(const std::string& name);

  bool contains(const std::string& name);

 private:
  std::vector<Entry> entries_;
  size_t sorted_ = 0;
};

template <class Entry>
struct Registration {
  explicit Registration(Entry entry) { Registry<Entry>::instance().add(std::move(entry)); }
};

}  // namespace moelab
