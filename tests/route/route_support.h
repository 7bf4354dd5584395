// Runs `moelab route` as a program on files, and compares what it writes with the oracle.
#pragma once

#include "core/tensor.h"
#include "oracle.h"

#include <map>
#include <random>
#include <string>
#include <vector>

namespace moelab::testing {

// What a run left: exit code, both streams, and the tensors of OUT (none where it was not written).
struct RouteRun {
  int code = -1;
  std::string out, err;
  bool wrote = false;
  std::map<std::string, Tensor> tensors;
};

// A folder for one case, removed at the end.
class RouteFolder {
 public:
  RouteFolder();
  ~RouteFolder();
  RouteFolder(const RouteFolder&) = delete;
  RouteFolder& operator=(const RouteFolder&) = delete;

  std::string file(const std::string& name) const { return path_ + "/" + name; }
  void write(const std::string& name, const std::string& text) const;

  // moelab route exp.toml --in in.safetensors --out out.safetensors <arguments>
  RouteRun run(const std::string& arguments) const;
  // The same with exactly these arguments.
  RouteRun run_bare(const std::string& arguments) const;

 private:
  std::string path_;
};

// Sizes of a case's input.
struct RouteSizes {
  int64_t rows = 12;
  int64_t width = 4;
  bool padding = true;
  bool sequences = true;  // two, interleaved
};

std::string toml_of(const oracle::Layer& layer);
oracle::Arrays random_inputs(const oracle::Layer& layer, const RouteSizes& sizes = {}, uint64_t seed = 1);
std::vector<NamedTensor> file_tensors(const oracle::Arrays& arrays, at::ScalarType dtype = at::kDouble);

RouteRun run_layer(const oracle::Layer& layer, const oracle::Arrays& arrays, const std::string& more = "",
                   at::ScalarType dtype = at::kDouble);

// Plan, output, losses, probes, state and every gradient; checks with Catch.
void expect_agreement(const oracle::Layer& layer, const oracle::Arrays& arrays, at::ScalarType dtype = at::kDouble);
// The same of a run with --grad that exists already.
void expect_agreement(const RouteRun& run, const oracle::Layer& layer, const oracle::Arrays& arrays, double tolerance = 1e-10);
// With --end-step, and every tensor of the router after it.
void expect_agreement_after_step(const oracle::Layer& layer, const oracle::Arrays& arrays);

std::vector<double> numbers(const Tensor& tensor);
std::vector<int64_t> integers(const Tensor& tensor);

}  // namespace moelab::testing
