// Tiny models from text, random batches, and what the tests of the model compare.
#pragma once

#include "core/config.h"
#include "core/error.h"
#include "core/model/model.h"
#include "tests/support/compare.h"

#include <string>

namespace moelab::test {

std::shared_ptr<Model> model_for(const DataShape& data, const std::string& text, bool allow_noncausal_training = false);

// A model of tokens.
std::shared_ptr<Model> model_of(const std::string& text, int64_t vocabulary = 11, bool allow_noncausal_training = false);

// Every parameter becomes a normal draw of width 0.4 around what it was, so that norms and gates differ from their start.
void shake(const Model& model, int64_t seed = 1);

// Random tokens, targets shifted by one.
Batch random_batch(int64_t sequences, int64_t length, int64_t vocabulary = 11, int64_t seed = 3);

// Step 9 of 20 with seed 4.
StepContext context_of(Mode mode);

Tensor logits_of(const Model& model, const Batch& batch, const StepContext& context);  // without gradient

// Task loss plus every balance term with its coefficient; the backward pass is done.
double loss_and_gradients(const Model& model, const Batch& batch, const StepContext& context);

// The message of the Error that making this model throws; "" where it is made.
std::string refusal_of(const std::string& text, bool allow_noncausal_training = false);

Tensor parameter_of(const Model& model, const std::string& name);


}  // namespace moelab::test
