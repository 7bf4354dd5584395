// Classifiers learn, are evaluated as a whole whatever the cut, and have no bits per byte.
#include "train_support.h"

#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>

#include <cmath>

namespace moelab::test {
namespace {

// Clusters whose classes a single linear map cannot tell: chance is 1/4.
TEST_CASE("a classifier of vectors learns clusters, and never beats the predictor that knows the source") {
  const std::string router = GENERATE("softmax_topk", "soft_moe", "expert_choice", "domain");
  CAPTURE(router);
  std::vector<std::string> set{"train.steps=300", "train.batch=64", "moe.experts=8", "moe.expert.width=32", "model.width=32",
                               "data.validation_vectors=1000", "optimizer.lr=0.01", "schedule.warmup_steps=20"};
  if (router == "expert_choice") set.push_back("moe.router.group=micro");
  if (router == "domain") set.push_back("moe.router.domains=8");
  const Experiment e = tiny_classifier("mlp", router, set);
  Trainer trainer = trainer_of(e);
  trainer.run();
  const Evaluation& found = trainer.last_evaluation();
  CHECK(found.tokens == 1000);
  CHECK(trainer.tokens() == 300 * 64);
  CHECK(found.accuracy > 0.7);
  CHECK(found.loss > e.data->known_entropy_bits() * std::log(2.0));
  CHECK(std::isnan(found.bits_per_byte));
}

// Forty noisy images can be learned by heart.
TEST_CASE("a classifier of images learns its training images by heart") {
  const std::string router = GENERATE("softmax_topk", "soft_moe");
  const Experiment e = tiny_classifier("patches", router, {"train.steps=150", "train.batch=16"});
  Trainer trainer = trainer_of(e);
  trainer.run();
  CHECK(trainer.last_window().metrics().at("loss") < 0.2);  // ln 3 = 1.1 at the start
}

// What belongs to an expert are columns of the one's parameter, and several rows of the other's.
TEST_CASE("experts that are not there stay as they are, with their part of the router, while the others learn") {
  const std::string router = GENERATE("domain", "soft_moe");
  CAPTURE(router);
  std::vector<std::string> set{"train.steps=4", "moe.experts=4", "moe.max_experts=6"};
  for (const char* option :
       {router == "domain" ? "hard=false" : "slots_per_expert=2", router == "domain" ? "domains=8" : "normalise=false"})
    set.push_back(std::string("moe.router.") + option);
  const Experiment e = tiny_classifier("mlp", router, set);
  const auto rows = [&] { return e.model->sites().front()->router->per_expert_tensors().front().detach().clone(); };
  const Tensor before = rows();
  trainer_of(e).run();
  const Tensor moved_E = rows().ne(before).flatten(1).any(1);
  CHECK(moved_E.slice(0, 0, 4).all().item<bool>());
  CHECK_FALSE(moved_E.slice(0, 4).any().item<bool>());
}

TEST_CASE("the evaluation of a classifier does not depend on its batches or on the ranks that share it") {
  const std::string model = GENERATE("patches", "mlp");
  const auto evaluation = [&](int64_t batch, int ranks) {
    std::vector<Evaluation> all(static_cast<size_t>(ranks));
    run_on_threads(ranks, [&](std::shared_ptr<Comm> comm) {
      const Experiment e = tiny_classifier(model, "softmax_topk", {"model.dtype=float64"});
      shake(*e.model);
      all[static_cast<size_t>(comm->rank())] = evaluate(*e.model, *e.data, {0, batch, 3}, *comm);
    });
    return all.front();
  };
  const Evaluation whole = evaluation(100, 1);
  CHECK(whole.tokens == (model == "patches" ? 10 : 20));
  CHECK(whole.records[0].rows == (model == "patches" ? 40 : 20));  // four patches of an image
  for (const Evaluation& cut : {evaluation(3, 1), evaluation(4, 2)}) {
    CHECK(far(cut.loss, whole.loss) < 1e-11);
    CHECK(cut.accuracy == whole.accuracy);
    CHECK(cut.records[1].chosen_E == whole.records[1].chosen_E);
    CHECK(far(cut.terms[0].at(0).value, whole.terms[0].at(0).value) < 1e-11);
  }
}

TEST_CASE("paired passes of thor agree about a class as they do about a token") {
  const Experiment e = tiny_classifier("patches", "thor", {"objective.name=paired_consistency"});
  Trainer trainer = trainer_of(e);
  trainer.run();
  const std::map<std::string, double> metrics = trainer.last_window().metrics();
  CHECK(metrics.at("consistency") > 0);
  CHECK(std::isfinite(metrics.at("loss")));
}

std::string classifier_refusal(const std::string& model, const std::string& router, const std::vector<std::string>& set) {
  try {
    tiny_classifier(model, router, set);
    return "";
  } catch (const Error& error) {
    CHECK(error.code() == ExitCode::kUsage);
    return error.what();
  }
}

TEST_CASE("routers that need what images and vectors do not have are refused at their name") {
  CHECK(classifier_refusal("patches", "hash", {}).find("tiny.toml:12:1: router 'hash' needs token ids") == 0);
  CHECK(classifier_refusal("patches", "hash", {"moe.router.vocabulary=9"}) ==
        "tiny.toml:12:1: router 'hash' needs token ids, which images do not have");
  CHECK(classifier_refusal("mlp", "stablemoe", {"moe.router.vocabulary=9"}) ==
        "tiny.toml:11:1: router 'stablemoe' needs token ids, which vectors do not have");
  CHECK(classifier_refusal("patches", "domain", {})
            .find("tiny.toml:12:1: router 'domain' needs domain labels, which these data do not have") == 0);
}

// As StableMoE's stand-in for a text model that cuts its sequences: nothing here does.
Registration<RouterEntry> registered_segment_router() {
  RouterEntry entry = Registry<RouterEntry>::instance().find("softmax_topk");
  entry.name = "segments_for_tests";
  entry.facts.needs_segments = true;
  return Registration<RouterEntry>{entry};
}
const Registration<RouterEntry> segment_registration = registered_segment_router();

TEST_CASE("a router that needs segments is refused, since no model gives them") {
  CHECK(classifier_refusal("mlp", "segments_for_tests", {}).find("tiny.toml:11:1: router 'segments_for_tests' needs segments") ==
        0);
}

TEST_CASE("what a router needs is refused where the layer's own table names the router") {
  const std::string refusal = classifier_refusal("mlp", "softmax_topk",
                                                 {"layer=[{where=\"last\", moe={router={name=\"domain\", "
                                                  "domains=1}}}]"});
  CAPTURE(refusal);
  CHECK(refusal.find("--set layer=") == 0);
  CHECK(refusal.find(": domains = 1, but the data have ") != std::string::npos);
}

}  // namespace
}  // namespace moelab::test
