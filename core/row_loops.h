// Loops over one row that the compiler turns into vector code, in a file compiled for it (row_loops.cpp). Each result is a
// function of the row alone: threads share out rows, so their number changes no bit. bfloat16 is computed in float.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>

namespace moelab {

enum class FfnActivation { kRelu, kGelu, kGeluTanh, kSwiglu };

// probs = softmax(logits). A logit more than 88 below the largest has probability 0 in float.
void softmax_row(const float* logits, float* probs, int64_t count);
void softmax_row(const double* logits, double* probs, int64_t count);

// grad becomes p ∘ (grad − ⟨p, grad⟩).
void softmax_row_backward(const float* probs, float* grad, int64_t count);
void softmax_row_backward(const double* probs, double* grad, int64_t count);

// The k largest, largest first; equal ones in the order of their places, −inf included.
void topk_of_row(const float* row, int64_t count, int64_t k, int64_t* best);
void topk_of_row(const double* row, int64_t count, int64_t k, int64_t* best);

#define MOELAB_ROW_LOOPS(Scalar, Sum)                                                                                     \
  /* a = act(h); swiglu: a = silu(h)·up */                                                                                \
  void activate_row(FfnActivation activation, const Scalar* h, const Scalar* up, Scalar* a, int64_t count);               \
  /* From grad = ∂/∂a: a again, grad becomes gate·∂/∂h and grad_up gate·∂/∂up; returns ⟨∂/∂a, a⟩. */                      \
  Sum activate_row_backward(FfnActivation activation, const Scalar* h, const Scalar* up, Sum gate, Scalar* a, Scalar* grad, \
                            Scalar* grad_up, int64_t count);                                                              \
  void scale_row(Scalar* row, Sum weight, int64_t count);                                                                 \
  void add_row(Sum* to, const Scalar* row, Sum weight, int64_t count); /* to += weight·row */                             \
  void shift_row(Scalar* row, const Scalar* by, int64_t count);        /* row += by */                                    \
  Sum dot_rows(const Scalar* a, const Scalar* b, int64_t count);
MOELAB_ROW_LOOPS(float, float)
MOELAB_ROW_LOOPS(double, double)
MOELAB_ROW_LOOPS(c10::BFloat16, float)
#undef MOELAB_ROW_LOOPS

}  // namespace moelab
