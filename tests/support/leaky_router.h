// A router that is told the next token, and denies it: what a leak looks like from outside.
#pragma once

#include "core/router.h"

namespace moelab::test {

inline constexpr const char* kLeakyRouter = "leaky_hash";

// Hash layers of the token to come, whose facts say what those of the token itself would say.
class LeakyRouter : public Router {
 public:
  explicit LeakyRouter(const RouterSpec& spec) : Router(spec) {
    RouterSpec future = spec;
    const RouterEntry& hash = Registry<RouterEntry>::instance().find("hash");
    for (const OptionSpec& option : hash.options)
      if (option.name == "kind") future.options.set(option, std::string("future"));
    hash_ = make_router("hash", future);
    add_child("hash", hash_);
  }
  RouteOutput route(const RouteInput& in, RouteState& state) const override { return hash_->route(in, state); }
  std::vector<Tensor> per_expert_tensors() const override { return hash_->per_expert_tensors(); }

 private:
  std::shared_ptr<Router> hash_;
};

// To be made once in each binary that wants it.
inline Registration<RouterEntry> registered_leaky_router() {
  RouterEntry entry = Registry<RouterEntry>::instance().find("hash");
  entry.name = kLeakyRouter;
  entry.make = [](RouterSpec spec) -> std::unique_ptr<Router> { return std::make_unique<LeakyRouter>(spec); };
  return Registration<RouterEntry>{entry};
}

}  // namespace moelab::test
