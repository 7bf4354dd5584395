#include "core/site_walk.h"

namespace moelab {

std::string site_name(const Site& site) { return site.path.substr(site.path.rfind('.') + 1); }

SiteShare SiteWalk::share_of_next() const { return shares_.empty() ? SiteShare{} : shares_.at(outputs_.size()); }

RouteInput SiteWalk::input_of(const MoELayer& site, const Tensor& x_TD) {
  const SiteShare share = share_of_next();
  RouteInput in = in_;
  in.x_TD = x_TD;
  in.use = site.site().use;
  in.forced = share.forced;
  in.carry = share.carry;
  if (const std::string name = site_name(site.site()); name != "moe") in.random = in_.random.with("site " + name);
  return in;
}

RouteOutput SiteWalk::decide(const MoELayer& site, const Tensor& x_TD) {
  RouteState fresh;
  RouteState* state = share_of_next().state;
  latest_ = input_of(site, x_TD);
  RouteOutput routed = site.decide(latest_, state ? *state : fresh);
  outputs_.push_back(site.observed(latest_, routed));
  return routed;
}

Tensor SiteWalk::run(const MoELayer& site, const Tensor& x_TD) {
  RouteState fresh;
  const SiteShare share = share_of_next();
  latest_ = input_of(site, x_TD);
  LayerOutput out = site.forward(latest_, share.state ? *share.state : fresh, share.cache);
  const Tensor y_TD = out.y_TD;
  outputs_.push_back(std::move(out));
  return y_TD;
}

ExecuteInput SiteWalk::input(const Tensor& x_TD) const {
  ExecuteInput input = execute_input(latest_);
  input.x_TD = x_TD;
  return input;
}

}  // namespace moelab
