// Bad input through the real program: one line with the place and the remedy, the documented exit code, nothing created.
#include "train_process.h"

#include "tests/support/tiny_experiment.h"

#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>

#include <fstream>

namespace moelab::test {
namespace {

const std::string kGoodInput = kTinyTables + "[train]\nsteps = 4\nbatch = 4\n[checkpoint]\nevery = 1\n";

// An experiment that lays `text` on the good one. `line` is what follows "moelab: "; "@" stands for the file.
struct BadInput {
  std::string text;
  std::string line;
  int code = 2;
  std::vector<std::string> set = {};
};

std::vector<BadInput> bad_inputs() {
  return {
      {"[train]\nstep = 3\n", "@:3:1: unknown key 'step' in [train], did you mean 'steps'?"},
      {"[modle]\nwidth = 3\n", "@:2:1: unknown key 'modle' at the top of the file, did you mean 'model'?"},
      {"[train]\nsteps = \"many\"\n", "@:3:1: 'steps' is a string, but must be an integer"},
      {"[train]\nrecompute = 1\n", "@:3:1: 'recompute' is an integer, but must be a bool"},
      {"moe = 3\n", "@:2:1: 'moe' is an integer, but must be a table [moe]"},
      {"[train]\nbatch = 0\n", "@:3:1: 'batch' is 0, but must be at least 1"},
      {"[optimizer]\nlr = nan\n", "@:3:1: 'lr' is nan, but must be at least 0"},
      {"[optimizer]\nbeta2 = 1.5\n", "@:3:1: 'beta2' is 1.5, but must be "},
      {"[train]\nsteps = 1\nsteps = 2\n", "@:4:"},
      {"[train\n", "@:2:"},
      {"# \xff\n", "@:2:"},
      {"[train]\nsteps = 2020-01-01\n", "@:3:1: a date or a time is no value here"},
      {"[moe.router]\nname = \"swich\"\n", "@:3:1: nothing is named 'swich', did you mean 'switch'? registered: "},
      {"[moe.expert]\nname = \"fnn\"\n", "@:3:1: nothing is named 'fnn', did you mean 'ffn'?"},
      {"[[loss]]\nname = \"balanse\"\n", "@:3:1: nothing is named 'balanse', did you mean 'balance'?"},
      {"[data]\nname = \"marcov\"\n", "@:3:1: nothing is named 'marcov', did you mean 'markov'?"},
      {"[train]\nobjective = \"tsk\"\n", "@:3:1: nothing is named 'tsk', did you mean 'task'?"},
      {"[moe.expert]\nactivation = \"reluu\"\n", "@:3:1: 'activation' is \"reluu\", but must be one of relu, "},
      {"[moe.router]\nname = \"softmax_topk\"\nk = 5\n", "@:4:1: k = 5 is more than experts = 4"},
      {"[moe.router]\nname = \"switch\"\nk = 2\n", "@:4:1: k = 2, but router 'switch' chooses 1 of each row's experts always"},
      {"[moe.router]\nname = \"hash\"\n[moe.noise]\nkind = \"normal\"\n",
       "@:5:1: router 'hash' has no logits that noise could change"},
      {"[moe.router]\nname = \"smear\"\n[moe.capacity]\nmode = \"factor\"\n", "@:5:1: router 'smear' drops nothing, "},
      {"[moe.capacity.eval]\nmode = \"factor\"\n[moe.router]\nname = \"lory\"\n", "@:3:1: router 'lory' drops nothing, "},
      {"[optimizer]\nlr = inf\n", "@:3:1: 'lr' is inf, but must be finite"},
      {"[moe]\nmax_experts = 2\n", "@:3:1: max_experts = 2 is less than experts = 4"},
      {"[model]\nlayers = 2\n[moe]\nexperts = 100000000000\n", "@:2:1: this model does not fit into memory"},
      {"[model]\nheads = 3\n", "@:3:1: width = 16 is not divisible by heads = 3"},
      {"[model]\nname = \"decodr\"\n", "@:3:1: nothing is named 'decodr', did you mean 'decoder'? registered: "},
      {"[model]\nname = \"patches\"\n",
       "@:3:1: model 'patches' reads images, but data set 'markov' holds tokens; in [model] set name = \"decoder\", or in [data] "
       "name = "},
      {"[data]\nname = \"clusters\"\n",
       "@:3:1: model 'decoder' reads tokens, but data set 'clusters' holds vectors; in [model] set name = \"mlp\", or in [data] "
       "name = "},
      {"[data]\nname = \"fashion_mnist\"\n",
       "@:3:1: model 'decoder' reads tokens, but data set 'fashion_mnist' holds images; in [model] set name = \"patches\", or "
       "in "},
      {"[model]\nmoe_layers = \"0,9\"\n", "@:3:1: there is no block 9: the model's blocks are 0 to 1"},
      {"[[layer]]\nwhere = \"som\"\n[layer.moe]\nexperts = 2\n", "@:3:1: 'som' names no blocks; write all, none, odd, even, "},
      {"[train]\nmicro_batches = 3\n", "@:3:1: batch = 4 cannot be split into 3 equal micro-batches"},
      {"[moe.router]\nname = \"uniform\"\n[[loss]]\nname = \"balance\"\n",
       "@:5:1: loss 'balance' cannot be used with router 'uniform': it reads the router's logits or probabilities, and this "
       "router has none"},
      {"[[layer]]\nwhere = \"last\"\n[layer.moe]\nexperts = 8\n[[loss]]\nname = \"balance\"\nlayers = \"pooled\"\n",
       "@:8:1: loss 'balance' pools its layers, which must have equally many experts, but layer 0 has 4 and layer 1 has 8; use "},
      {"[[loss]]\nname = \"z\"\n[[loss]]\nname = \"z\"\n",
       "@:5:1: two losses are labelled 'z'; give one of them another `label`"},
      {"[moe.capacity]\nmode = \"factor\"\npriority = \"batch\"\n",
       "@:4:1: layer 0: router 'switch' looks ahead in training of a causal model: "},
      {"[moe.capacity]\nfactor = 1.5\n", "@:3:1: 'factor' is not read without a `mode`; "},
      {"[moe.capacity]\nmode = \"paper\"\nfactor = 1.5\n", "@:4:1: 'factor' is not read with mode = \"paper\""},
      {"[moe.capacity.eval]\nmin = 4\n", "@:3:1: 'min' is not read without a `mode`; "},
      {"[moe.capacity]\nmode = \"none\"\nfactor = 1.5\n",
       "@:4:1: 'factor' is not read with mode = \"none\"; it is read with mode = factor or token_fraction"},
      {"[moe.capacity]\nmode = \"factor\"\nvalue = 3\n", "@:4:1: 'value' is not read with mode = \"factor\"; "},
      {"[moe.capacity]\nmode = \"absolute\"\nvalue = 3\nfactor = 2\n", "@:5:1: 'factor' is not read with mode = \"absolute\"; "},
      {"[moe.capacity]\nmode = \"absolute\"\nvalue = 3\nmin = 2\n", "@:5:1: 'min' is not read with mode = \"absolute\"; "},
      {"[moe.capacity]\nmode = \"token_fraction\"\ntimes_k = true\n",
       "@:4:1: 'times_k' is not read with mode = \"token_fraction\"; it is read with mode = factor"},
      {"[moe.capacity.eval]\nmode = \"none\"\nfactor = 2.0\n", "@:4:1: 'factor' is not read with mode = \"none\"; "},
      {"[moe.capacity]\nmode = \"absolute\"\n", "@:3:1: mode = \"absolute\" needs `value`, the places of each expert"},
      {"[moe.capacity.eval]\nmode = \"absolute\"\n", "@:3:1: mode = \"absolute\" needs `value`, the places of each expert"},
      {"[moe.capacity]\nmode = \"factor\"\nfactor = 0\n", "@:4:1: factor = 0 leaves the experts no place; "},
      {"[moe.noise]\nkind = \"none\"\nstd = 2.0\n", "@:4:1: 'std' is not read with kind = \"none\"; "},
      {"[moe.noise]\nkind = \"normal\"\nepsilon = 0.1\n", "@:4:1: 'epsilon' is not read with kind = \"normal\"; "},
      {"[[loss]]\nname = \"balance\"\ndivide_by_k = true\n", "@:4:1: 'divide_by_k' is not read with counts = \"first_choice\"; "},
      {"[[loss]]\nname = \"load\"\n",
       "@:3:1: loss 'load' has a gradient through noise on the logits alone, and router 'switch' "},
      {"[moe.router]\nname = \"gshard\"\nsecond_expert = \"all\"\nthreshold = 0.3\n",
       "@:5:1: 'threshold' is not read with second_expert = \"all\" and second_expert_eval = \"all\"; "},
      {"[optimizer]\nname = \"sgd\"\nbeta1 = 0.5\n",
       "@:4:1: 'beta1' is not read with name = \"sgd\"; it is read with name = adamw"},
      {"[optimizer]\nmomentum = 0.5\n", "@:3:1: 'momentum' is not read with name = \"adamw\"; it is read with name = sgd"},
      {"[optimizer]\nbeta1 = 1\n", "@:3:1: 'beta1' is 1, but must be at least 0 and less than 1"},
      {"[schedule]\ndecay = \"constant\"\nfinal_fraction = 0.2\n",
       "@:4:1: 'final_fraction' is not read with decay = \"constant\"; it is read unless decay = constant"},
      {"[moe.shared]\ngate = true\n", "@:3:1: 'gate' is not read with count = 0; it is read unless count = 0"},
      {"[eval]\nbaseline = \"ngram\"\n", "@:3:1: n-grams of bytes need text, and data set 'markov' has none; "},
      {"[route]\nstepp = 3\n", "@:3:1: unknown key 'stepp' in [route], did you mean 'step'?"},
      {"[model]\ndtype = \"float64\"\n[train]\nprecision = \"bf16\"\n", "@:5:1: bf16 autocast leaves float64 alone; "},
      {"[moe.router]\nname = \"sigmoid_topk\"\ngroups = 3\n", "@:4:1: [moe.router] groups = 3 does not divide experts = 4"},
      {"[moe.router]\nname = \"expert_choice\"\nscore_norm = \"tokens\"\neval = \"thresholds\"\n",
       "@:5:1: [moe.router] eval = \"thresholds\" needs score_norm = \"experts\": "},
      {"[[layer]]\nwhere = \"last\"\n[layer.moe.router]\nname = \"sigmoid_topk\"\ngroups = 3\n",
       "@:6:1: [moe.router] groups = 3 does not divide experts = 4"},
      {"[attention]\nexperts = 6\n[[layer]]\nwhere = \"last\"\n[layer.attention]\nexperts = 3\n[[loss]]\nname = "
       "\"balance\"\nlayers "
       "= \"pooled\"\n",
       "@:10:1: loss 'balance' pools its layers, which must have equally many experts, but layer 0 has 6 and layer 1 has 3; "
       "use "},
      {"[init]\nfrom = \"nowhere\"\n", "@:3:1: [init] from: '", 5},
      {"plugins = \"nowhere.so\"\n", "@:2:1: cannot read '"},
      {"name = \"../elsewhere\"\n", "@:2:1: '../elsewhere' cannot name a folder"},
      {"", "--set train.steps: there is no '='; write --set table.key=value", 2, {"train.steps"}},
      {"", "--set train.stepz=3: unknown key 'stepz' in [train], did you mean 'steps'?", 2, {"train.stepz=3"}},
  };
}

bool is_one_line(const std::string& text) { return std::count(text.begin(), text.end(), '\n') == 1 && text.ends_with('\n'); }

std::string with_file(std::string line, const std::string& file) {
  if (const size_t at = line.find('@'); at != std::string::npos) line.replace(at, 1, file);
  return "moelab: " + line;
}

TEST_CASE("bad experiments end with one line at the place of the fault, and no run is begun") {
  const ScratchFolder folder;
  folder.put("good.toml", kGoodInput);
  const std::string file = folder / "exp.toml";
  for (const BadInput& bad : bad_inputs()) {
    folder.put("exp.toml", "extends = \"good.toml\"\n" + bad.text);
    std::vector<std::string> arguments{"run", file, "--out", "runs/bad"};
    for (const std::string& set : bad.set) arguments.insert(arguments.end(), {"--set", set});
    const ProgramResult result = run_moelab(arguments, folder.path());
    CAPTURE(bad.text, bad.line, result.err);
    CHECK(result.code == bad.code);
    CHECK(result.out.empty());
    CHECK(is_one_line(result.err));
    CHECK(result.err.starts_with(with_file(bad.line, file)));
    CHECK(folder.files() == std::vector<std::string>{"exp.toml", "good.toml"});
    CHECK_FALSE(std::filesystem::exists(folder / "runs"));
  }
}

// Input that is not there, or no place to write to: `line` is all of stderr, "@" stands for the folder.
struct MissingInput {
  std::vector<std::string> arguments;
  std::string line;
  int code = 5;
};

std::vector<MissingInput> missing_inputs() {
  return {
      {{"run", "nowhere.toml"}, "nowhere.toml: no such file"},
      {{"run", "god.toml"}, "god.toml: no such file, did you mean 'good.toml'?"},
      {{"run", "loop.toml"}, "loop.toml:1:1: 'extends' runs in a loop: loop.toml -> loop.toml", 2},
      {{"run", "bytes.toml", "--out", "run"}, "bytes.toml:5:1: @/nowhere.txt: no such file or folder; check `path`"},
      {{"run", "kjv.toml", "--out", "run"}, ""},
      {{"run", "good.toml", "--out", "good.toml"}, "good.toml is a file; choose another folder with --out", 2},
      {{"run", "good.toml", "--out", "/proc/moelab"}, "cannot create '/proc/moelab': "},
      {{"resume", "nowhere"}, "nowhere is no run folder: it has no config.resolved.toml"},
      {{"eval", "nowhere"}, "nowhere is no run folder: it has no config.resolved.toml"},
      {{"run", "good.toml", "--outt", "x"}, "run: unknown option '--outt', did you mean '--out'?", 2},
  };
}

TEST_CASE("what is missing or cannot be written is named, and nothing is created") {
  const ScratchFolder folder;
  folder.put("good.toml", kGoodInput);
  folder.put("loop.toml", "extends = \"loop.toml\"\n");
  folder.put("bytes.toml", "[model]\nlayers = 1\n[data]\nname = \"bytes\"\npath = \"nowhere.txt\"\n");
  folder.put("kjv.toml", "[model]\nlayers = 1\n[data]\nname = \"kjv\"\n");
  const std::vector<std::string> before = folder.files();
  setenv("XDG_CACHE_HOME", (folder / "empty").c_str(), 1);
  setenv("MOELAB_CACHE", (folder / "empty").c_str(), 1);
  for (const MissingInput& missing : missing_inputs()) {
    const ProgramResult result = run_moelab(missing.arguments, folder.path());
    CAPTURE(missing.arguments, result.err);
    CHECK(result.code == missing.code);
    CHECK(is_one_line(result.err));
    CHECK(result.err.starts_with(with_file(missing.line, folder.path())));
    CHECK(folder.files() == before);
  }
  unsetenv("XDG_CACHE_HOME");
  unsetenv("MOELAB_CACHE");
}

ProgramResult with_file_limit(const ScratchFolder& folder, int blocks) {
  const std::string command = "ulimit -f " + std::to_string(blocks) + "; exec " MOELAB_PROGRAM " run good.toml --out run --quiet";
  return run_program("/bin/sh", {"-c", command}, folder.path());
}

TEST_CASE("where the disk takes no more, the file is named and no part of a checkpoint is left") {
  const ScratchFolder folder;
  folder.put("good.toml", kGoodInput);
  // The limit holds for the test's own capture of stderr too: a limit of 0 leaves the exit code alone.
  const ProgramResult nothing = with_file_limit(folder, 0);
  CHECK(nothing.code == 5);
  CHECK(folder.files() == std::vector<std::string>{"good.toml", "run/.lock"});
  const ProgramResult some = with_file_limit(folder, 40);  // enough for records, too little for the tensors
  CHECK(some.code == 5);
  CHECK(is_one_line(some.err));
  CHECK(some.err ==
        "moelab: cannot write 'run/ckpt/step-1.tmp/model.safetensors': File too large; free some space, then `moelab "
        "resume run`\n");
  for (const std::string& file : folder.files()) CHECK(file.find("ckpt") == std::string::npos);
  CHECK(text_of(folder / "run/STATUS").starts_with("failed: cannot write 'run/ckpt/"));
  CHECK(run_moelab({"resume", "run", "--quiet"}, folder.path()).code == 0);
}

TEST_CASE("a batch that memory cannot hold is refused at its place") {
  const ScratchFolder folder;
  folder.put("good.toml", kGoodInput);
  const std::string command = "ulimit -v 6000000; exec " MOELAB_PROGRAM
                              " run good.toml --out run --quiet --set train.batch=400000000";
  const ProgramResult result = run_program("/bin/sh", {"-c", command}, folder.path());
  CAPTURE(result.err);
  CHECK(result.code == 2);
  CHECK(is_one_line(result.err));
  CHECK(
      result.err.starts_with("moelab: --set train.batch=400000000: memory ran out: take a smaller batch, more micro_batches, "));
  CHECK(text_of(folder / "run/STATUS").starts_with("failed: --set train.batch=400000000: memory ran out"));
}

TEST_CASE("tables with other numbers of experts pool their layers apart") {
  const ScratchFolder folder;
  folder.put("good.toml", kGoodInput + "[attention]\nexperts = 6\n[[loss]]\nname = \"balance\"\nlayers = \"pooled\"\n");
  const ProgramResult result = run_moelab({"run", "good.toml", "--out", "run", "--quiet"}, folder.path());
  CAPTURE(result.err);
  CHECK(result.code == 0);
}

TEST_CASE("what a later file or --set leaves unread is dropped, and the resolved config does not say it") {
  const ScratchFolder folder;
  folder.put("base.toml", kGoodInput + "[moe.capacity]\nmode = \"factor\"\nfactor = 1.5\n[optimizer]\nbeta1 = 0.8\n");
  folder.put("exp.toml", "extends = \"base.toml\"\n[moe.capacity]\nmode = \"none\"\n");
  const ProgramResult run = run_moelab({"run", "exp.toml", "--out", "run", "--quiet", "--set", "optimizer.name=sgd"},
                                       folder.path());
  CAPTURE(run.err);
  CHECK(run.code == 0);
  CHECK(run.err.find("base.toml:23:1: 'factor' is not read with mode = \"none\"; ") != std::string::npos);
  const std::string resolved = text_of(folder / "run/config.resolved.toml");
  CHECK(resolved.find("mode = \"none\"") != std::string::npos);
  CHECK(resolved.find("factor") == std::string::npos);
  CHECK(resolved.find("beta1") == std::string::npos);
  CHECK(run_moelab({"resume", "run", "--quiet"}, folder.path()).code == 0);
}

TEST_CASE("a run that was stopped before its first checkpoint says so") {
  const ScratchFolder folder;
  folder.put("good.toml", kGoodInput);
  REQUIRE(run_moelab({"run", "good.toml", "--out", "run", "--quiet"}, folder.path()).code == 0);
  std::filesystem::remove_all(folder / "run/ckpt");
  for (const std::vector<std::string>& command : {std::vector<std::string>{"eval", "run"}, {"ckpt", "inspect", "run"}}) {
    const ProgramResult result = run_moelab(command, folder.path());
    CHECK(result.code == 5);
    CHECK(result.err == "moelab: run has no checkpoint yet: it was stopped before the first; go on with `moelab resume run`\n");
  }
}

void damage(const std::string& file) {
  std::fstream bytes(file, std::ios::in | std::ios::out | std::ios::binary);
  bytes.seekp(-5, std::ios::end);
  bytes.put('\x5a');
  bytes.put('\x5b');
}

TEST_CASE("a damaged checkpoint is skipped with a word, and a run without a good one is refused") {
  const ScratchFolder folder;
  folder.put("good.toml", kGoodInput);
  REQUIRE(run_moelab({"run", "good.toml", "--out", "run", "--quiet"}, folder.path()).code == 0);
  const auto whole = checkpoint_files(folder / "run");
  const auto metrics = timeless_metrics(folder / "run");
  damage(folder / "run/ckpt/step-4/model.safetensors");
  const ProgramResult fallen_back = run_moelab({"resume", "run", "--quiet"}, folder.path());
  CAPTURE(fallen_back.err);
  CHECK(fallen_back.code == 0);
  CHECK(is_one_line(fallen_back.err));
  CHECK(fallen_back.err.starts_with("moelab: checkpoint of step 4 skipped: "));
  CHECK(checkpoint_files(folder / "run") == whole);
  CHECK(timeless_metrics(folder / "run") == metrics);
  for (const char* step : {"3", "4"}) damage(folder / ("run/ckpt/step-" + std::string(step) + "/optimizer.safetensors"));
  const ProgramResult refused = run_moelab({"resume", "run", "--quiet"}, folder.path());
  CAPTURE(refused.err);
  CHECK(refused.code == 5);
  CHECK(is_one_line(refused.err));
  CHECK(refused.err.starts_with("moelab: no valid checkpoint in 'run/ckpt', 2 tried; "));
  CHECK(timeless_metrics(folder / "run") == metrics);
}

TEST_CASE("training that diverges ends with 3, with the layer and the step, and says so in STATUS") {
  const ScratchFolder folder;
  folder.put("good.toml", kGoodInput);
  const ProgramResult result = run_moelab(
      {"run", "good.toml", "--out", "run", "--quiet", "--set", "optimizer.lr=1e38", "--set", "train.clip_norm=0"}, folder.path());
  CAPTURE(result.err);
  CHECK(result.code == 3);
  CHECK(is_one_line(result.err));
  CHECK(result.err.find("non-finite") != std::string::npos);
  CHECK(result.err.find("at step 1") != std::string::npos);
  CHECK(text_of(folder / "run/STATUS") == "failed: " + result.err.substr(8));
  const nlohmann::json summary = nlohmann::json::parse(text_of(folder / "run/summary.json"));
  CHECK(summary.at("outcome") == "diverged");
  CHECK(summary.at("error").get<std::string>() + "\n" == result.err.substr(8));
  CHECK(summary.at("step") == 1);
  CHECK(summary.at("eval.loss").is_null());
  CHECK(summary.at("verdict") == "not judged");
}

}  // namespace
}  // namespace moelab::test
