#include "bench_support.h"

#include "core/error.h"
#include "core/memory.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <fmt/format.h>
#include <malloc.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>

namespace moelab::bench {
namespace {

// glibc's own starting values; setting them stops it from adapting them, so the two modes can alternate.
void return_freed_memory() {
  mallopt(M_MMAP_THRESHOLD, 128 << 10);
  mallopt(M_TRIM_THRESHOLD, 128 << 10);
  mallopt(M_TOP_PAD, 0);
  malloc_trim(0);
}

class PeakProbe : public c10::MemoryReportingInfoBase {
 public:
  void reportMemoryUsage(void*, int64_t size, size_t, size_t, c10::Device) override { peak = std::max(peak, alive += size); }
  bool memoryProfilingEnabled() const override { return true; }
  int64_t alive = 0, peak = 0;
};

// One thread is timed by the processor time of the process, which other programs disturb least; more threads by the clock.
double seconds_of(const benchmark::BenchmarkReporter::Run& run) {
  const bool one = run.run_name.function_name.ends_with("/threads1");
  return one ? run.cpu_accumulated_time : run.real_accumulated_time;
}

class KeepingReporter : public benchmark::ConsoleReporter {
 public:
  KeepingReporter() : ConsoleReporter(OO_Tabular) {}
  void ReportRuns(const std::vector<Run>& runs) override {
    for (const Run& run : runs) {
      if (run.run_type != Run::RT_Iteration) continue;
      times_[run.run_name.function_name].push_back(seconds_of(run));
      peaks_[run.run_name.function_name].push_back(run.counters.at("peak_bytes"));
    }
    ConsoleReporter::ReportRuns(runs);
  }
  double median(const std::string& name) const { return median_of(times_, name); }
  double peak(const std::string& name) const { return median_of(peaks_, name); }

 private:
  using Values = std::map<std::string, std::vector<double>>;
  static double median_of(const Values& values, const std::string& name) {
    const auto found = values.find(name);
    if (found == values.end()) return std::nan("");  // filtered out
    std::vector<double> sorted = found->second;
    std::sort(sorted.begin(), sorted.end());
    return sorted[sorted.size() / 2];
  }

  Values times_, peaks_;
};

std::string verdict(const RatioRow& row, double ratio) {
  if (row.bar == 0) return "";
  return (row.above ? ratio >= row.bar : ratio <= row.bar) ? "met" : "not met";
}

double ratio_of(const RatioRow& row, const KeepingReporter& times) {
  const auto value = [&](const std::string& line) { return row.of_peaks ? times.peak(line) : times.median(line); };
  const double ratio = row.scale * value(row.numerator) / (row.denominator.empty() ? 1 : value(row.denominator));
  return row.from_one ? 1 - ratio : ratio;
}

std::string ratio_table(const std::vector<RatioRow>& rows, const KeepingReporter& times) {
  std::string table = "| what | ratio | bar | |\n| --- | --- | --- | --- |\n";
  for (const RatioRow& row : rows) {
    const double ratio = ratio_of(row, times);
    if (std::isnan(ratio)) continue;
    const std::string bar = row.bar == 0 ? "" : fmt::format("{} {:g}", row.above ? "≥" : "≤", row.bar);
    table += fmt::format("| {} | {:.2f} | {} | {} |\n", row.what, ratio, bar, verdict(row, ratio));
  }
  return table;
}

std::string ceiling_table(const KeepingReporter& times) {
  const double product = 2.0 * 1024 * 1024 * 1024 * 1e-9;
  return fmt::format(
      "Ceilings in the same run: one thread {:.0f} GFLOP/s multiply-add, {:.1f} GB/s copy (read and written), {:.0f} "
      "GFLOP/s matrix product 1024³; two threads {:.0f} GFLOP/s matrix product.\n",
      2.0 * 8 * 8 * (1 << 20) / times.median("ceiling/fma/threads1") * 1e-9,
      2.0 * (64 << 20) / times.median("ceiling/copy/threads1") * 1e-9, product / times.median("ceiling/gemm/threads1"),
      product / times.median("ceiling/gemm/threads2"));
}

// Eight independent chains of eight lanes: enough to keep two multiply-add units busy.
#if defined(__x86_64__) && !defined(__clang__)
__attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#endif
float multiply_adds(float start) {
  float lane[8][8];
  for (auto& chain : lane)
    for (float& value : chain) value = start;
  for (int i = 0; i < 1 << 20; ++i)
    for (auto& chain : lane)
      for (float& value : chain) value = value * 0.999f + 0.001f;
  float sum = 0;
  for (const auto& chain : lane)
    for (const float value : chain) sum += value;
  return sum;
}

}  // namespace

int64_t peak_bytes(const std::function<void()>& work) {
  const auto probe = std::make_shared<PeakProbe>();
  const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, probe);
  work();
  return probe->peak;
}

void check_close(const Tensor& a, const Tensor& b, const std::string& what, double tolerance) {
  const double error = a.sub(b).abs().max().item<double>() / b.abs().max().item<double>();
  check_invariant(error < tolerance, fmt::format("{}: wrong answer before timing ({:.2g})", what, error));
}

void Suite::add(Line line) {
  benchmark::RegisterBenchmark(line.name.c_str(), [line](benchmark::State& state) {
    at::set_num_threads(line.threads);
    line.keep_memory ? keep_freed_memory() : return_freed_memory();
    const int64_t peak = peak_bytes(line.work);  // warms up, too
    for (auto _ : state)
      for (int64_t i = 0; i < line.inner; ++i) line.work();
    for (const auto& [name, value] : line.counters) state.counters[name] = value;
    state.counters["peak_bytes"] = static_cast<double>(peak);
    if (line.counters.count("flops") != 0)
      state.counters["flops_rate"] =
          benchmark::Counter(line.counters.at("flops") * static_cast<double>(line.inner),
                             benchmark::Counter::kIsIterationInvariantRate);
    at::set_num_threads(1);
  })->Unit(benchmark::kMillisecond)->Iterations(1)->Repetitions(line.repetitions)->MeasureProcessCPUTime();
}

void Suite::add_ceilings() {
  const Tensor a = at::rand({1024, 1024}), b = at::rand({1024, 1024}), from = at::rand({16 << 20}), to = at::empty_like(from);
  add(Line{.name = "ceiling/fma/threads1", .work = [] { benchmark::DoNotOptimize(multiply_adds(0.5f)); }});
  add(Line{.name = "ceiling/copy/threads1", .work = [=] { std::memcpy(to.data_ptr(), from.data_ptr(), 64 << 20); }});
  for (const int threads : {1, 2})
    add(Line{.name = fmt::format("ceiling/gemm/threads{}", threads), .work = [=] { benchmark::DoNotOptimize(a.mm(b)); },
             .threads = threads});
}

int Suite::run(int argc, char** argv) {
  std::vector<char*> arguments(argv, argv + argc);
  char interleave[] = "--benchmark_enable_random_interleaving=true";
  arguments.insert(arguments.begin() + 1, interleave);
  int count = static_cast<int>(arguments.size());
  benchmark::Initialize(&count, arguments.data());
  if (benchmark::ReportUnrecognizedArguments(count, arguments.data())) return 2;
  add_ceilings();
  KeepingReporter reporter;
  benchmark::RunSpecifiedBenchmarks(&reporter);
  const std::string table = ceiling_table(reporter) + "\n" + ratio_table(ratios_, reporter);
  std::cout << table;
  if (const char* file = std::getenv("MOELAB_BENCH_MARKDOWN")) std::ofstream(file) << table;
  return 0;
}

}  // namespace moelab::bench
