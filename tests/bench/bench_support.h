// What the benchmarks share: lines measured in one process, ratios of their medians as a Markdown table, ceilings of the machine,
// peak bytes.
//
// Lines that a ratio compares are measured together, interleaved, before the next group begins: on a machine that others use,
// too, the speed of a core changes by half from minute to minute, and a ratio must not be one of two different minutes.
#pragma once

#include "core/tensor.h"

#include <benchmark/benchmark.h>

#include <functional>
#include <map>
#include <string>
#include <vector>

namespace moelab::bench {

struct Line {
  std::string name;             // "moe_layer/fwd_bwd/T4096_d256_f1024_E8_k2/threads1"
  std::function<void()> work;
  int threads = 1;
  bool keep_memory = true;      // freed memory stays in the process, as in the program; false: it goes back, as in plain LibTorch
  int repetitions = 9;
  int64_t inner = 1;            // runs of `work` per repetition
  std::map<std::string, double> counters = {};  // flops, bytes, rows_per_expert, …; peak_bytes is measured
};

// time(numerator) / time(denominator) beside its bar. `above`: the ratio must reach the bar; else it must stay below.
struct RatioRow {
  std::string what;
  std::string numerator, denominator;  // names of lines; without a denominator the ratio is scale · seconds
  double bar = 0;                      // 0: shown without a bar
  bool above = true;
  double scale = 1;                    // of the ratio
  bool from_one = false;               // 1 − ratio is shown
  bool of_peaks = false;               // of peak_bytes instead of times
};

class Suite {
 public:
  void add(Line line);
  void add(RatioRow row) { ratios_.push_back(std::move(row)); }

  // Google Benchmark's arguments; --benchmark_out is written as JSON. Prints the ratios, and writes them to the file that
  // MOELAB_BENCH_MARKDOWN names.
  int run(int argc, char** argv);

 private:
  void add_ceilings();
  std::vector<std::vector<std::string>> groups() const;  // names of lines, each line in one group
  std::vector<std::string> lines_;
  std::vector<RatioRow> ratios_;
};

// The most bytes alive at a time during `work`, beyond those before it.
int64_t peak_bytes(const std::function<void()>& work);

// Takes the time of so many floating-point operations at the speed of multiply-add, on the threads in use: no product is faster.
void spend_flops(double flops);

// Ends the program where two tensors that should be equal are not: a wrong line must not be timed.
void check_close(const Tensor& a, const Tensor& b, const std::string& what, double tolerance = 1e-4);

}  // namespace moelab::bench
