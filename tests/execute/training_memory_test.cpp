// Training does not grow: as many bytes are alive after 200 steps as after 20, with an optimiser, evaluations and observers.
#include "allocations.h"
#include "tests/train/train_support.h"

#include <catch2/catch_test_macros.hpp>

#include <fstream>
#include <map>

using namespace moelab;
using namespace moelab::test;
using moelab::testing::AllocationProbe;
using moelab::testing::allocations_of;

namespace {

// Resident pages of the process, in bytes.
int64_t resident_bytes() {
  std::ifstream file("/proc/self/statm");
  int64_t all = 0, resident = 0;
  file >> all >> resident;
  return resident * 4096;
}

// Runs the model beside the training, as observers may, and notes what is alive at the end of some steps.
class MemoryNotes : public Observer {
 public:
  MemoryNotes(const AllocationProbe& probe, const Batch& batch) : probe_(probe), batch_(batch) {}
  Request on_step(const StepView& view) override {
    view.probe_forward(batch_, nullptr);
    const int64_t step = view.step + 1;
    if (step == 20 || step == 120 || step == 200) alive[step] = probe_.alive, resident[step] = resident_bytes();
    return Request::kNone;
  }
  void on_evaluation(const Evaluation&, int64_t, bool) override { ++evaluations; }
  std::map<int64_t, int64_t> alive, resident;
  int evaluations = 0;

 private:
  const AllocationProbe& probe_;
  Batch batch_;
};

// The window of metrics is emptied every log_every steps: the noted steps are as far in theirs.
const std::vector<std::string> kSteps{"train.steps=200", "train.log_every=5", "eval.every=20"};

void check_flat(const Experiment& e) {
  allocations_of([&](const AllocationProbe& probe) {
    MemoryNotes notes(probe, e.data->eval_batch(0, 2));
    Trainer trainer = trainer_of(e, "", {&notes});
    trainer.run();
    REQUIRE(notes.alive.size() == 3);
    CHECK(notes.evaluations >= 10);
    CAPTURE(notes.alive, notes.resident);
    CHECK(notes.alive.at(20) > 0);
    CHECK(notes.alive.at(200) == notes.alive.at(20));
    CHECK(notes.alive.at(120) == notes.alive.at(20));
    // Pages hold what is not LibTorch's too, and the heap's gaps: a leak of 32 KiB a step would show.
    CHECK(notes.resident.at(200) - notes.resident.at(20) < 180 * (32 << 10));
  });
}

}  // namespace

TEST_CASE("200 training steps of a routed text model leave as many bytes alive as 20") {
  check_flat(tiny_experiment("noisy_topk", kSteps, "[[loss]]\nname = \"balance\"\n[[loss]]\nname = \"z\"\n"));
}

TEST_CASE("200 training steps of routed adapters on a frozen base leave as many bytes alive as 20") {
  std::vector<std::string> set = kSteps;
  set.insert(set.end(), {"model.moe_layers=none", "adapters.experts=3", "adapters.router.k=2", "adapters.expert.rank=2",
                         "adapters.expert.targets=all"});
  check_flat(tiny_experiment("softmax_topk", set));
}
