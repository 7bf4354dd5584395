#include "core/comm.h"

#include <ATen/core/ivalue.h>
#include <torch/csrc/autograd/custom_function.h>

namespace moelab {
namespace {

// What the backward needs; no tensor among it.
struct AllToAllRoute : torch::CustomClassHolder {
  std::shared_ptr<Comm> comm;
  std::vector<int64_t> send, receive;
};

struct AllToAllFunction : torch::autograd::Function<AllToAllFunction> {
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& input,
                        const c10::intrusive_ptr<AllToAllRoute>& route) {
    context->saved_data["route"] = at::IValue::make_capsule(route);
    return route->comm->all_to_all(input, route->send, route->receive);
  }

  // The permutation of rows turned around. It is differentiable itself, so second derivatives work as well.
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& gradients) {
    const auto route = c10::static_intrusive_pointer_cast<AllToAllRoute>(context->saved_data["route"].toCapsule());
    return {all_to_all_differentiable(route->comm, gradients[0], route->receive, route->send), Tensor()};
  }
};

}  // namespace

Tensor all_to_all_differentiable(const std::shared_ptr<Comm>& comm, const Tensor& input, const std::vector<int64_t>& send,
                                 const std::vector<int64_t>& receive) {
  auto route = c10::make_intrusive<AllToAllRoute>();
  route->comm = comm;
  route->send = send;
  route->receive = receive;
  return AllToAllFunction::apply(input, route);
}

}  // namespace moelab
