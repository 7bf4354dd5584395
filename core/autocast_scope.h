// Autocast for passes that are run again inside the backward pass.
#pragma once

#include <ATen/autocast_mode.h>

namespace moelab {

// Autocast as it was, without its cache: a copy made by the pass without gradient would cut the graph of the other.
class AutocastScope {
 public:
  struct State {
    bool enabled;
    at::ScalarType dtype;
  };
  static State current(at::DeviceType device) {
    return {at::autocast::is_autocast_enabled(device), at::autocast::get_autocast_dtype(device)};
  }

  AutocastScope(at::DeviceType device, State state)
      : device_(device), before_(current(device)), cached_(at::autocast::is_autocast_cache_enabled()) {
    set(state, false);
  }
  ~AutocastScope() { set(before_, cached_); }
  AutocastScope(const AutocastScope&) = delete;
  AutocastScope& operator=(const AutocastScope&) = delete;

 private:
  void set(State state, bool cached) const {
    at::autocast::set_autocast_enabled(device_, state.enabled);
    at::autocast::set_autocast_dtype(device_, state.dtype);
    at::autocast::set_autocast_cache_enabled(cached);
  }
  at::DeviceType device_;
  State before_;
  bool cached_;
};

}  // namespace moelab
