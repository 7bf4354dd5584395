// Routers and losses that break one rule each, registered in this test binary alone, and the property that has to find each of
// them.
#pragma once

#include "core/linear_router.h"
#include "core/loss.h"

#include <string>
#include <vector>

namespace moelab {

struct Mutant {
  std::string name;               // mutant_…
  std::string property;           // that kills it
  std::vector<std::string> also;  // others that may: what its mistake breaks beside
};
// Of mutants whose every plan is invalid, or another one each time.
inline constexpr const char* kAnyProperty = "any property";

std::vector<Mutant> mutants();  // of all files
std::vector<Mutant> choice_mutants();
std::vector<Mutant> state_mutants();
std::vector<Mutant> decode_mutants();
std::vector<Mutant> fact_mutants();

// Losses, which are attached to an honest router while they are asked for, and to none otherwise.
std::vector<Mutant> loss_mutants();
std::string& loss_on_trial();

// Routers that break nothing, though they do what mutants only pretend to do: control_….
std::vector<std::string> controls();

// A plain softmax top-k router, cut at the places where mutants differ from it.
class PlainRouter : public LinearRouter {
 public:
  explicit PlainRouter(const RouterSpec& spec)
      : PlainRouter(spec, resolved_noise(spec.noise, NoiseSpec::Kind::kNone), /*trainable=*/true) {}

  RouteOutput route(const RouteInput& in, RouteState& state) const override {
    const RouteInput seen = input(in);
    const NoisyLogits logits = scored(seen, state);
    const Tensor choice_TK = seen.forced ? seen.forced->choice_TK : choice(logits.noisy_TE);
    const Tensor probs_TE = probabilities(logits.noisy_TE), prob_TK = gather_choices(probs_TE, choice_TK);
    const Tensor loss_TE = loss_probabilities(logits.clean_TE);
    Scores scores{logits.noisy_TE, probs_TE, loss_TE, logits.clean_TE, logits.noisy_TE, logits.std_TE};
    RouteOutput out = finish_sparse(seen, finishing(), {choice_TK, gate(seen, prob_TK), prob_TK, {}}, std::move(scores));
    afterwards(in, out);
    return out;
  }

 protected:
  PlainRouter(const RouterSpec& spec, NoiseSpec noise, bool trainable)
      : LinearRouter(spec, normal_tensor(spec.init.with("weight"), {spec.max_experts, spec.width}, 0.02, spec.dtype), noise,
                     trainable) {}

  virtual RouteInput input(const RouteInput& in) const { return in; }
  virtual NoisyLogits scored(const RouteInput& in, RouteState&) const { return score(in); }
  virtual Tensor choice(const Tensor& logits_TE) const { return stable_topk(logits_TE, spec_.k()); }
  virtual Tensor probabilities(const Tensor& logits_TE) const { return logits_TE.softmax(1); }
  virtual Tensor loss_probabilities(const Tensor& logits_TE) const { return logits_TE.softmax(1); }
  virtual Tensor gate(const RouteInput&, const Tensor& prob_TK) const { return prob_TK; }
  virtual RouterSpec finishing() const { return spec_; }
  virtual void afterwards(const RouteInput&, RouteOutput&) const {}
};

inline NoisyLogits moved(NoisyLogits logits, const Tensor& by) {
  logits.clean_TE = logits.clean_TE.add(by);
  logits.noisy_TE = logits.noisy_TE.add(by);
  return logits;
}

// Registers a mutant of PlainRouter with its name, what it says of itself, and its renormalisation unless asked otherwise.
template <class Broken>
Registration<RouterEntry> registered(const char* name, RouterFacts facts = {}, const char* renormalise = "none",
                                     OptionSpecs more = {}) {
  OptionSpecs options{k_option(2), renormalise_option(renormalise)};
  options.insert(options.end(), more.begin(), more.end());
  return Registration<RouterEntry>{{
      .name = name,
      .title = "for tests",
      .citation = "none",
      .equation = "none",
      .facts = facts,
      .options = options,
      .paper_losses = {{"balance", 0.01, {{"counts", std::string("any_choice")}}}},
      .make = [](RouterSpec spec) -> std::unique_ptr<Router> { return std::make_unique<Broken>(spec); },
  }};
}

}  // namespace moelab
