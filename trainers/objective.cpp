#include "trainers/objective.h"

#include "core/registry_impl.h"

namespace moelab {
namespace {

class TaskObjective : public Objective {
 public:
  ObjectiveOutput compute(const Model& model, const Batch& batch, const StepContext& context) const override {
    ObjectiveOutput out;
    out.passes.push_back(model.forward(batch, context));
    out.loss_sum = cross_entropy_sum(out.passes.front().logits_BLV, batch.targets_BL);
    out.task_sum = out.loss_sum.item<double>();
    return out;
  }
};

const Registration<ObjectiveEntry> registration_task{{
    .name = "task",
    .title = "The task loss alone",
    .equation = "Σ −ln p(target) / target tokens of the step",
    .make = [](const Options&) { return std::make_unique<TaskObjective>(); },
}};

}  // namespace

template class Registry<ObjectiveEntry>;

Objective::~Objective() = default;

std::unique_ptr<Objective> make_objective(const std::string& name, const Options& options) {
  return Registry<ObjectiveEntry>::instance().find(name).make(options);
}

std::unique_ptr<Objective> make_objective(const std::string& name) {
  return make_objective(name, Options(Registry<ObjectiveEntry>::instance().find(name).options));
}

}  // namespace moelab
