#include "bench_support.h"

#include "core/error.h"
#include "core/memory.h"
#include "core/parallel.h"

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
#include <regex>
#include <string_view>

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

// Keeps the numbers of all groups, shows them, and writes them as JSON where a file is named.
class KeepingReporter : public benchmark::ConsoleReporter {
 public:
  explicit KeepingReporter(const std::string& json_file) : ConsoleReporter(OO_Tabular) {
    if (json_file.empty()) return;
    file_.open(json_file);
    check_invariant(file_.good(), "cannot write " + json_file);
    json_.SetOutputStream(&file_);
  }
  bool ReportContext(const Context& context) override {
    if (!first_group_) return true;
    first_group_ = false;
    return (!file_.is_open() || json_.ReportContext(context)) && ConsoleReporter::ReportContext(context);
  }
  void Finalize() override {}  // Google Benchmark calls it after every group
  void finish() {
    if (file_.is_open()) json_.Finalize();
  }
  void ReportRuns(const std::vector<Run>& runs) override {
    for (const Run& run : runs) {
      if (run.run_type != Run::RT_Iteration) continue;
      times_[run.run_name.function_name].push_back(seconds_of(run));
      peaks_[run.run_name.function_name].push_back(run.counters.at("peak_bytes"));
    }
    ConsoleReporter::ReportRuns(runs);
    if (file_.is_open()) json_.ReportRuns(runs);
  }
  double median(const std::string& name) const { return ranked(times_, name, 0.5); }
  double shortest(const std::string& name) const { return ranked(times_, name, 0); }
  double peak(const std::string& name) const { return ranked(peaks_, name, 0.5); }

 private:
  using Values = std::map<std::string, std::vector<double>>;
  static double ranked(const Values& values, const std::string& name, double rank) {
    const auto found = values.find(name);
    if (found == values.end()) return std::nan("");  // filtered out
    std::vector<double> sorted = found->second;
    std::sort(sorted.begin(), sorted.end());
    return sorted[static_cast<size_t>(rank * static_cast<double>(sorted.size()))];
  }

  Values times_, peaks_;
  std::ofstream file_;
  benchmark::JSONReporter json_;
  bool first_group_ = true;
};

// Takes the value of --name=value out of the arguments; "" where it is not among them.
std::string taken(std::vector<char*>& arguments, const std::string& name) {
  const std::string start = "--" + name + "=";
  const auto found = std::find_if(arguments.begin(), arguments.end(),
                                  [&](const char* argument) { return std::string_view(argument).starts_with(start); });
  if (found == arguments.end()) return "";
  std::string value = *found + start.size();
  arguments.erase(found);
  return value;
}

// The names that the filter lets pass, as one regular expression; "" = none.
std::string expression_of(const std::vector<std::string>& names, const std::regex& filter) {
  std::string all;
  for (const std::string& name : names)
    if (std::regex_search(name, filter)) all += (all.empty() ? "^(" : "|") + name;
  return all.empty() ? "" : all + ")/iterations";
}

std::string verdict(const RatioRow& row, double ratio) {
  if (row.bar == 0) return "";
  return (row.above ? ratio >= row.bar : ratio <= row.bar) ? "met" : "not met";
}

double ratio_of(const RatioRow& row, const std::function<double(const std::string& line)>& value) {
  const double ratio = row.scale * value(row.numerator) / (row.denominator.empty() ? 1 : value(row.denominator));
  return row.from_one ? 1 - ratio : ratio;
}

std::string ratio_table(const std::vector<RatioRow>& rows, const KeepingReporter& times) {
  // Where other programs slowed the machine for half of a group's time, its medians are of two machines; the shortest are not.
  std::string table = "| what | ratio | of the shortest | bar | |\n| --- | --- | --- | --- | --- |\n";
  for (const RatioRow& row : rows) {
    const double ratio =
        ratio_of(row, [&](const std::string& line) { return row.of_peaks ? times.peak(line) : times.median(line); });
    if (std::isnan(ratio)) continue;
    const double best = ratio_of(row, [&](const std::string& line) { return times.shortest(line); });
    const std::string bar = row.bar == 0 ? "" : fmt::format("{} {:g}", row.above ? "≥" : "≤", row.bar);
    const std::string shortest = row.of_peaks ? "" : fmt::format("{:.2f}", best);
    table += fmt::format("| {} | {:.2f} | {} | {} | {} |\n", row.what, ratio, shortest, bar, verdict(row, ratio));
  }
  return table;
}

constexpr int kChains = 8, kLanes = 8;  // of the ceiling of multiply-add
constexpr double kRoundFlops = 2.0 * kChains * kLanes, kCeilingFlops = kRoundFlops * (1 << 20);

std::string ceiling_table(const KeepingReporter& times) {
  const double product = 2.0 * 1024 * 1024 * 1024 * 1e-9;
  return fmt::format(
      "Ceilings in the same run: one thread {:.0f} GFLOP/s multiply-add, {:.1f} GB/s copy (read and written), {:.0f} "
      "GFLOP/s matrix product 1024³; two threads {:.0f} GFLOP/s matrix product.\n",
      kCeilingFlops / times.median("ceiling/fma/threads1") * 1e-9,
      2.0 * (64 << 20) / times.median("ceiling/copy/threads1") * 1e-9, product / times.median("ceiling/gemm/threads1"),
      product / times.median("ceiling/gemm/threads2"));
}

// Leaves free memory at the end of the heap that has its pages: where a block of some 30 MB finds no gap in a heap full of them,
// the run that asks for it would else pay for new pages, which cost more than the numbers in them.
void reserve_pages() {
  constexpr int64_t kBytes = 768 << 20, kPage = 4096;  // less than what keep_freed_memory keeps at the heap's end
  const Tensor memory = at::empty({kBytes}, at::kByte);
  auto* bytes = memory.mutable_data_ptr<uint8_t>();
  for (int64_t at = 0; at < kBytes; at += kPage) bytes[at] = 1;
}

void keep_memory() {
  keep_freed_memory();
  reserve_pages();
}

// Eight independent chains of eight lanes: enough to keep two multiply-add units busy.
#if defined(__x86_64__) && !defined(__clang__)
__attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#endif
float multiply_adds(int64_t rounds) {
  float lane[kChains][kLanes];
  for (auto& chain : lane)
    for (float& value : chain) value = 0.5f;
  for (int64_t i = 0; i < rounds; ++i)
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

void spend_flops(double flops) {
  const auto rounds = static_cast<int64_t>(flops / kRoundFlops);
  parallel_for(0, rounds, rounds / at::get_num_threads() + 1, [](int64_t begin, int64_t end) {
    benchmark::DoNotOptimize(multiply_adds(end - begin));
  });
}

void check_close(const Tensor& a, const Tensor& b, const std::string& what, double tolerance) {
  const double error = a.sub(b).abs().max().item<double>() / b.abs().max().item<double>();
  check_invariant(error < tolerance, fmt::format("{}: wrong answer before timing ({:.2g})", what, error));
}

void Suite::add(Line line) {
  lines_.push_back(line.name);
  benchmark::RegisterBenchmark(line.name.c_str(), [line](benchmark::State& state) {
    at::set_num_threads(line.threads);
    line.keep_memory ? keep_memory() : return_freed_memory();
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
  add(Line{.name = "ceiling/fma/threads1", .work = [] { spend_flops(kCeilingFlops); }});
  add(Line{.name = "ceiling/copy/threads1", .work = [=] { std::memcpy(to.data_ptr(), from.data_ptr(), 64 << 20); }});
  for (const int threads : {1, 2})
    add(Line{.name = fmt::format("ceiling/gemm/threads{}", threads), .work = [=] { benchmark::DoNotOptimize(a.mm(b)); },
             .threads = threads});
}

std::vector<std::vector<std::string>> Suite::groups() const {
  std::map<std::string, std::string> leader;  // of a line's group
  for (const std::string& line : lines_) leader[line] = line;
  for (const RatioRow& row : ratios_) {
    if (leader.count(row.numerator) == 0 || leader.count(row.denominator) == 0) continue;
    const std::string from = leader.at(row.denominator), to = leader.at(row.numerator);
    for (auto& [line, its] : leader)
      if (its == from) its = to;
  }
  std::map<std::string, size_t> place;  // groups in the order of their first lines
  std::vector<std::vector<std::string>> all;
  for (const std::string& line : lines_) {
    const auto [found, added] = place.try_emplace(leader.at(line), all.size());
    if (added) all.emplace_back();
    all[found->second].push_back(line);
  }
  return all;
}

int Suite::run(int argc, char** argv) {
  std::vector<char*> arguments(argv, argv + argc);
  char interleave[] = "--benchmark_enable_random_interleaving=true";
  arguments.insert(arguments.begin() + 1, interleave);
  KeepingReporter reporter(taken(arguments, "benchmark_out"));
  const std::regex filter(taken(arguments, "benchmark_filter"));
  int count = static_cast<int>(arguments.size());
  benchmark::Initialize(&count, arguments.data());
  if (benchmark::ReportUnrecognizedArguments(count, arguments.data())) return 2;
  add_ceilings();
  for (const std::vector<std::string>& group : groups()) {
    const std::string expression = expression_of(group, filter);
    if (!expression.empty()) benchmark::RunSpecifiedBenchmarks(&reporter, nullptr, expression);
  }
  reporter.finish();
  const std::string table = ceiling_table(reporter) + "\n" + ratio_table(ratios_, reporter);
  std::cout << table;
  if (const char* file = std::getenv("MOELAB_BENCH_MARKDOWN")) std::ofstream(file) << table;
  return 0;
}

}  // namespace moelab::bench
