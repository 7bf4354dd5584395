#include "tests/core/comm_support.h"

#include <ATen/core/grad_mode.h>
#include <catch2/catch_test_macros.hpp>
#include <torch/csrc/autograd/autograd.h>

using namespace moelab;
using namespace moelab::test;

namespace {

// Every operation against plain loops over the blocks of all ranks.
void exercise_reductions(Comm& comm, at::ScalarType dtype) {
  Tensor sum = at::zeros({3, 4}, dtype), high = rank_block(0, {3, 4}, dtype), low = high.clone();
  for (int r = 0; r < comm.size(); ++r) {
    const Tensor block = rank_block(r, {3, 4}, dtype);
    sum += block;
    high = at::where(block > high, block, high);
    low = at::where(block < low, block, low);
  }
  const Tensor wanted[] = {sum, high, low};
  const Reduce operations[] = {Reduce::kSum, Reduce::kMax, Reduce::kMin};
  for (int i = 0; i < 3; ++i) {
    Tensor mine = rank_block(comm.rank(), {3, 4}, dtype);
    comm.all_reduce(mine, operations[i]);
    expect_equal(mine, wanted[i], "all_reduce " + std::to_string(i));
  }
}

void exercise_reduce_scatter(Comm& comm, at::ScalarType dtype) {
  const int64_t n = 2;
  Tensor sum = at::zeros({comm.size() * n, 3}, dtype);
  for (int r = 0; r < comm.size(); ++r) sum += rank_block(r, {comm.size() * n, 3}, dtype);
  const Tensor mine = comm.reduce_scatter(rank_block(comm.rank(), {comm.size() * n, 3}, dtype));
  expect_equal(mine, sum.slice(0, comm.rank() * n, (comm.rank() + 1) * n), "reduce_scatter");
}

void exercise_all_gather(Comm& comm, at::ScalarType dtype) {
  std::vector<Tensor> blocks;  // rank 1 has no row
  const auto rows = [](int rank) { return int64_t{rank == 1 ? 0 : rank + 1}; };
  for (int r = 0; r < comm.size(); ++r) blocks.push_back(rank_block(r, {rows(r), 2}, dtype));
  expect_equal(comm.all_gather(blocks[comm.rank()]), at::cat(blocks), "all_gather");
}

void exercise_broadcast(Comm& comm, at::ScalarType dtype) {
  for (int root = 0; root < comm.size(); ++root) {
    Tensor mine = rank_block(comm.rank(), {5}, dtype);
    comm.broadcast(mine, root);
    expect_equal(mine, rank_block(root, {5}, dtype), "broadcast");
  }
}

// Rows sent from `from` to `to`: uneven, with zeros; the last rank of several sends and gets nothing.
int64_t sent_rows(int from, int to, int size) {
  if (size > 1 && (from == size - 1 || to == size - 1)) return 0;
  return (2 * from + 3 * to + 1) % 4;
}

struct Exchange {
  std::vector<int64_t> send, receive;
  int64_t rows = 0;
};

Exchange exchange_of(int rank, int size) {
  Exchange exchange;
  for (int r = 0; r < size; ++r) {
    exchange.send.push_back(sent_rows(rank, r, size));
    exchange.receive.push_back(sent_rows(r, rank, size));
    exchange.rows += exchange.send.back();
  }
  return exchange;
}

// The rows that `rank` must receive, given the input of every rank.
Tensor received_rows(const std::vector<Tensor>& inputs, int rank, int size) {
  std::vector<Tensor> parts;
  for (int from = 0; from < size; ++from) {
    int64_t start = 0;
    for (int to = 0; to < rank; ++to) start += sent_rows(from, to, size);
    parts.push_back(inputs[from].slice(0, start, start + sent_rows(from, rank, size)));
  }
  return at::cat(parts);
}

std::vector<Tensor> exchange_inputs(int size, at::ScalarType dtype) {
  std::vector<Tensor> inputs;
  for (int r = 0; r < size; ++r) inputs.push_back(rank_block(r, {exchange_of(r, size).rows, 3}, dtype));
  return inputs;
}

void exercise_all_to_all(Comm& comm, at::ScalarType dtype) {
  const std::vector<Tensor> inputs = exchange_inputs(comm.size(), dtype);
  const Exchange mine = exchange_of(comm.rank(), comm.size());
  const Tensor seen = comm.all_to_all(inputs[comm.rank()], mine.send, mine.receive);
  expect_equal(seen, received_rows(inputs, comm.rank(), comm.size()), "all_to_all");
}

void exercise_all(Comm& comm, at::ScalarType dtype) {
  exercise_reductions(comm, dtype);
  exercise_reduce_scatter(comm, dtype);
  exercise_all_gather(comm, dtype);
  exercise_broadcast(comm, dtype);
  exercise_all_to_all(comm, dtype);
  comm.barrier();
}

}  // namespace

TEST_CASE("every operation equals plain loops on 1 to 4 thread ranks") {
  for (int ranks = 1; ranks <= 4; ++ranks) {
    run_on_threads(ranks, [&](const CommPointer& comm) {
      expect(comm->size() == ranks, "size");
      for (at::ScalarType dtype : kNumberTypes) exercise_all(*comm, dtype);
    });
  }
}

TEST_CASE("the single backend equals plain loops on one rank") {
  const CommPointer comm = single_comm();
  CHECK(comm->rank() == 0);
  CHECK(comm->size() == 1);
  for (at::ScalarType dtype : kNumberTypes) exercise_all(*comm, dtype);
  CHECK(comm->split(3, 1)->size() == 1);
  const Tensor input = at::ones({2, 2});
  comm->all_gather(input).zero_();
  CHECK(at::equal(input, at::ones({2, 2})));
}

TEST_CASE("booleans move, and reduce by max and min") {
  run_on_threads(3, [](const CommPointer& comm) {
    Tensor any = at::full({2}, comm->rank() == 1, at::kBool), all = any.clone();
    comm->all_reduce(any, Reduce::kMax);
    comm->all_reduce(all, Reduce::kMin);
    expect(any.all().item<bool>() && !all.any().item<bool>(), "any and all");
    expect_equal(comm->all_gather(at::full({1}, comm->rank() == 2, at::kBool)), at::arange(3).eq(2), "gather");
  });
  CHECK(contains(message_of([] { single_comm()->all_reduce(at::ones({1}, at::kBool)); }), "bool"));
}

TEST_CASE("sums run in rank order, bitwise the same on every rank and every time") {
  // (1e8 + 1) - 1e8 is 0 in float in this order, and 1 in another.
  const std::vector<float> values{1e8f, 1.0f, -1e8f, 0.25f};
  const float wanted = ((values[0] + values[1]) + values[2]) + values[3];
  for (int repeat = 0; repeat < 50; ++repeat) {
    run_on_threads(4, [&](const CommPointer& comm) {
      const Tensor mine = at::full({1}, values[comm->rank()]);
      comm->all_reduce(mine);
      expect(mine.item<float>() == wanted, "rank order");
    });
  }
}

TEST_CASE("empty tensors and zero counts pass through every operation") {
  run_on_threads(3, [](const CommPointer& comm) {
    comm->all_reduce(at::empty({0, 4}));
    comm->broadcast(at::empty({0}), 2);
    expect(comm->reduce_scatter(at::empty({0, 4})).sizes() == at::IntArrayRef{0, 4}, "reduce_scatter");
    expect(comm->all_gather(at::empty({0, 4})).sizes() == at::IntArrayRef{0, 4}, "all_gather");
    expect(comm->all_to_all(at::empty({0, 4}), {0, 0, 0}, {0, 0, 0}).sizes() == at::IntArrayRef{0, 4}, "all_to_all");
  });
}

TEST_CASE("strided inputs are gathered right, strided in-place tensors are refused") {
  run_on_threads(2, [](const CommPointer& comm) {
    const auto strided = [](int rank) { return rank_block(rank, {3, 4}, at::kFloat).t(); };
    const Tensor gathered = comm->all_gather(strided(comm->rank()));
    expect_equal(gathered, at::cat({strided(0), strided(1)}), "strided all_gather");
    expect(gathered.is_contiguous(), "contiguous result");
    const Tensor moved = comm->all_to_all(strided(comm->rank()), {2, 2}, {2, 2});
    const int64_t start = 2 * comm->rank();
    expect_equal(moved, at::cat({strided(0).slice(0, start, start + 2), strided(1).slice(0, start, start + 2)}), "strided");
  });
  CaughtErrors caught;
  run_on_threads(2, [&](const CommPointer& comm) {
    const Tensor strided = at::ones({3, 4}).t();
    caught.run(comm->rank(), [&] { comm->all_reduce(comm->rank() == 1 ? strided : strided.contiguous()); });
  });
  CHECK(caught.all_say(2, ExitCode::kBug, {"rank 1", "contiguous"}));
}

TEST_CASE("handles may be waited for in another order on every rank") {
  run_on_threads(3, [](const CommPointer& comm) {
    const Tensor a = at::ones({2}), b = at::ones({3}) * (comm->rank() + 1);
    const auto first = comm->all_reduce_async(a, Reduce::kSum);
    const auto second = comm->all_reduce_async(b, Reduce::kMax);
    comm->barrier();
    if (comm->rank() == 1) first->wait();
    second->wait();
    first->wait();
    first->wait();
    expect_equal(a, at::full({2}, 3.0f), "first");
    expect_equal(b, at::full({3}, 3.0f), "second");
  });
}

TEST_CASE("results belong to their rank alone") {
  run_on_threads(2, [](const CommPointer& comm) {
    const Tensor gathered = comm->all_gather(at::zeros({1}));
    gathered.fill_(comm->rank() + 1);
    comm->barrier();
    expect_equal(gathered, at::full({2}, static_cast<float>(comm->rank() + 1)), "own memory");
  });
}

TEST_CASE("the gradient of a differentiable all_to_all equals that of a single process") {
  for (int ranks = 1; ranks <= 4; ++ranks) {
    std::vector<Tensor> inputs = exchange_inputs(ranks, at::kDouble), weights;
    Tensor loss = at::zeros({}, at::kDouble);
    for (Tensor& input : inputs) input.requires_grad_();
    for (int r = 0; r < ranks; ++r) {
      const Tensor received = received_rows(inputs, r, ranks);
      weights.push_back(rank_block(r + 3, received.sizes(), at::kDouble));
      loss = loss + (received.square() * weights[r]).sum();
    }
    loss.backward();
    run_on_threads(ranks, [&](const CommPointer& comm) {
      const Exchange mine = exchange_of(comm->rank(), ranks);
      const Tensor input = inputs[comm->rank()].detach().clone().requires_grad_();
      const Tensor received = all_to_all_differentiable(comm, input, mine.send, mine.receive);
      (received.square() * weights[comm->rank()]).sum().backward();
      expect_equal(input.grad(), inputs[comm->rank()].grad(), "gradient");
    });
  }
}

TEST_CASE("gradients flow there and back again, through strided gradients and twice") {
  run_on_threads(2, [](const CommPointer& comm) {
    const Tensor x = at::full({2, 3}, 2.0 + comm->rank(), at::kDouble).requires_grad_();
    const Tensor there = all_to_all_differentiable(comm, x, {1, 1}, {1, 1});
    const Tensor back = all_to_all_differentiable(comm, there.pow(3), {1, 1}, {1, 1});
    // The gradient of sum() has stride 0.
    const Tensor first = torch::autograd::grad({back.sum()}, {x}, {}, /*retain_graph=*/true, /*create_graph=*/true)[0];
    expect_equal(first.detach(), 3 * x.detach().square(), "first derivative");
    first.sum().backward();
    expect_equal(x.grad(), 6 * x.detach(), "second derivative");
  });
}

TEST_CASE("parameters' gradients may be reduced while they require grad") {
  run_on_threads(2, [](const CommPointer& comm) {
    const Tensor weight = at::ones({2}).requires_grad_();
    comm->broadcast(weight, 1);
    (weight * (comm->rank() + 1)).sum().backward();
    comm->all_reduce(weight.mutable_grad());
    expect_equal(weight.grad(), at::full({2}, 3.0f), "sum of gradients");
  });
}

TEST_CASE("split makes independent groups ordered by key, which run at their own pace") {
  run_on_threads(4, [](const CommPointer& comm) {
    const int color = comm->rank() % 2;
    const CommPointer half = comm->split(color, -comm->rank());  // the higher old rank comes first
    expect(half->size() == 2 && half->rank() == (comm->rank() < 2 ? 1 : 0), "order by key");
    for (int repeat = 0; repeat < (color == 0 ? 3 : 40); ++repeat) exercise_all(*half, at::kDouble);
    const Tensor old_rank = at::full({1}, comm->rank(), at::kLong);
    half->all_reduce(old_rank);
    expect(old_rank.item<int64_t>() == (color == 0 ? 0 + 2 : 1 + 3), "members");
    exercise_all(*comm, at::kFloat);
    expect(half->split(0, 0)->size() == 2, "split of a split");
  });
}

TEST_CASE("each thread starts with gradients on and its own autograd state") {
  const at::NoGradGuard no_grad;
  run_on_threads(2, [](const CommPointer& comm) {
    expect(at::GradMode::is_enabled(), "gradients on");
    if (comm->rank() == 0) at::GradMode::set_enabled(false);
    comm->barrier();
    expect(at::GradMode::is_enabled() == (comm->rank() == 1), "own state");
  });
}
