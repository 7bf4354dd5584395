// Deadlines, aborts, ranks that fail, calls that do not fit: nobody hangs, and each message names what and who.
#include "tests/core/comm_support.h"

#include <ATen/core/grad_mode.h>
#include <catch2/catch_test_macros.hpp>
#include <torch/csrc/autograd/autograd.h>

using namespace moelab;
using namespace moelab::test;

TEST_CASE("a deadline names the operation and the ranks that are missing") {
  CaughtErrors caught;
  run_on_threads(4, [&](const CommPointer& comm) {
    comm->set_deadline(std::chrono::milliseconds(200));
    if (comm->rank() == 1 || comm->rank() == 3) return;
    caught.run(comm->rank(), [&] { comm->all_reduce(at::ones({2, 5})); });
  });
  CHECK(caught.all_say(2, ExitCode::kPeerLost, {"ranks 1, 3 did not come within 200 ms", "all_reduce(sum) of Float [2, 5]"}));
}

TEST_CASE("a deadline holds in a group made by split, and a late rank fails at once") {
  CaughtErrors caught;
  run_on_threads(2, [&](const CommPointer& comm) {
    comm->set_deadline(std::chrono::milliseconds(200));
    const CommPointer pair = comm->split(7, comm->rank());
    comm->set_deadline(std::chrono::seconds(60));
    if (comm->rank() == 0) caught.run(0, [&] { pair->barrier(); });
    comm->barrier();
    if (comm->rank() == 1) caught.run(1, [&] { pair->barrier(); });
  });
  CHECK(caught.all_say(2, ExitCode::kPeerLost, {"rank 1 did not come", "world/7", "barrier"}));
}

TEST_CASE("abort wakes all who wait, in subgroups too, and later calls fail at once") {
  CaughtErrors caught;
  run_on_threads(3, [&](const CommPointer& comm) {
    const CommPointer all = comm->split(0, 0);
    if (comm->rank() == 0) {
      comm->abort("disk is full");
      caught.run(0, [&] { comm->barrier(); });
    } else {
      caught.run(comm->rank(), [&] { all->all_gather(at::ones({1})); });
    }
  });
  CHECK(caught.all_say(3, ExitCode::kPeerLost, {"aborted: disk is full"}));
  const CommPointer single = single_comm();
  single->abort("no reason");
  CHECK(contains(message_of([&] { single->barrier(); }), "no reason"));
}

TEST_CASE("the first exception of a rank ends the others and comes out") {
  const auto body = [](const CommPointer& comm) {
    const CommPointer half = comm->split(comm->rank() / 2, 0);
    if (comm->rank() == 2) throw std::out_of_range("boom");
    (comm->rank() == 3 ? half : comm)->barrier();
  };
  CHECK_THROWS_AS(run_on_threads(4, body), std::out_of_range);
  CHECK(message_of([&] { run_on_threads(4, body); }) == "boom");
  CHECK_THROWS_AS(run_on_threads(2, [](const CommPointer& comm) { comm->rank() == 0 ? throw 5 : comm->barrier(); }), int);
}

TEST_CASE("a failure inside backward on one rank does not leave the others waiting") {
  const auto body = [](const CommPointer& comm) {
    const Tensor x = at::ones({2, 1}).requires_grad_();
    const Tensor y = all_to_all_differentiable(comm, x, {1, 1}, {1, 1});
    if (comm->rank() == 1) throw std::runtime_error("no backward here");
    y.sum().backward();
  };
  CHECK(message_of([&] { run_on_threads(2, body); }) == "no backward here");
}

TEST_CASE("ranks that call different things are all told so") {
  const auto errors_of = [](const std::function<void(Comm&)>& rank0, const std::function<void(Comm&)>& rank2) {
    CaughtErrors caught;
    run_on_threads(3, [&](const CommPointer& comm) {
      caught.run(comm->rank(), [&] { comm->rank() == 2 ? rank2(*comm) : rank0(*comm); });
    });
    return caught.by_rank;
  };
  const auto told = [&](const std::function<void(Comm&)>& rank0, const std::function<void(Comm&)>& rank2,
                        const std::vector<std::string>& words) {
    CaughtErrors caught;
    caught.by_rank = errors_of(rank0, rank2);
    return caught.all_say(3, ExitCode::kBug, words);
  };
  const auto reduce = [](const Tensor& tensor, Reduce op = Reduce::kSum) {
    return [tensor, op](Comm& comm) { comm.all_reduce(tensor.clone(), op); };
  };
  const Tensor three = at::ones({3});
  CHECK(told([](Comm& comm) { comm.barrier(); }, reduce(three), {"rank 0 calls barrier, rank 2 calls all_reduce(sum)"}));
  CHECK(told(reduce(three), reduce(three, Reduce::kMax), {"all_reduce(sum)", "rank 2 calls all_reduce(max)"}));
  CHECK(told(reduce(three), reduce(three.to(at::kDouble)), {"of Float [3]", "rank 2", "of Double [3]"}));
  CHECK(told(reduce(three), reduce(at::ones({4})), {"[3]", "rank 2", "[4]"}));
  CHECK(told([&](Comm& comm) { comm.all_gather(at::ones({2, 3})); }, [&](Comm& comm) { comm.all_gather(at::ones({2, 4})); },
             {"all_gather rows of Float [3]", "rank 2"}));
  CHECK(told([&](Comm& comm) { comm.broadcast(three.clone(), 0); }, [&](Comm& comm) { comm.broadcast(three.clone(), 1); },
             {"broadcast from rank 0", "broadcast from rank 1"}));
}

TEST_CASE("all_to_all counts that do not fit are refused on every rank") {
  const auto errors = [](std::vector<int64_t> send1, std::vector<int64_t> receive1, const std::vector<std::string>& words) {
    CaughtErrors caught;
    run_on_threads(2, [&](const CommPointer& comm) {
      const std::vector<int64_t> one{1, 1};
      const bool odd = comm->rank() == 1;
      caught.run(comm->rank(), [&] { comm->all_to_all(at::ones({2, 3}), odd ? send1 : one, odd ? receive1 : one); });
    });
    return caught.all_say(2, ExitCode::kBug, words);
  };
  CHECK(errors({2, 1}, {1, 1}, {"rank 1", "sends [2, 1], 3 rows in all, but its input has 2"}));
  CHECK(errors({1, 1}, {2, 1}, {"rank 0 sends 1 rows to rank 1, which expects 2"}));
  CHECK(errors({0, 2}, {1, 1}, {"rank 1 sends 0 rows to rank 0, which expects 1"}));
  CHECK(errors({1, 1, 0}, {1, 1}, {"rank 1", "needs 2 counts"}));
  CHECK(errors({3, -1}, {1, 1}, {"rank 1", "0 or more", "[3, -1]"}));
  CHECK_THROWS_AS(single_comm()->all_to_all(at::ones({2}), {2}, {1}), Error);
}

TEST_CASE("a failure inside LibTorch reaches every rank in one line") {
  CaughtErrors caught;
  run_on_threads(2, [&](const CommPointer& comm) {
    caught.run(comm->rank(), [&] { comm->all_reduce(at::ones({2}, at::kComplexFloat), Reduce::kMax); });
  });
  CHECK(caught.all_say(2, ExitCode::kBug, {"all_reduce(max) of ComplexFloat"}));
  for (const auto& [rank, error] : caught.by_rank) CHECK_FALSE(contains(error.second, "\n"));
}

TEST_CASE("wrong calls say what is wrong") {
  CHECK(contains(message_of([] { single_comm()->broadcast(at::ones({1}), 1); }), "rank 1, but there are 1 ranks"));
  CHECK(contains(message_of([] { single_comm()->all_gather(at::ones({})); }), "all_gather needs a tensor with rows"));
  CHECK(contains(message_of([] { single_comm()->all_reduce(Tensor()); }), "undefined"));
  CHECK(contains(message_of([] {
                   run_on_threads(2, [](const CommPointer& comm) { comm->reduce_scatter(at::ones({3})); });
                 }),
                 "reduce_scatter of 3 rows does not divide among 2 ranks"));
  CHECK_THROWS_AS(run_on_threads(0, [](const CommPointer&) {}), Error);
}
