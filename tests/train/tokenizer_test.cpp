// Training on SentencePiece units and on token files: bits per byte by hand, bitwise repetition and resume, the run's own model.
#include "tests/data/data_support.h"
#include "train_process.h"
#include "train_support.h"

#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>

namespace moelab::test {
namespace {

using data_tests::Environment;
using data_tests::wordy_text;

constexpr const char* kPieceTables = R"(
seed = 4
[model]
layers = 1
width = 16
heads = 2
context = 12
[moe]
experts = 4
[moe.router]
name = "hash"
[moe.expert]
width = 8
[data]
name = "bytes"
path = "text"
validation = 0.05
tokenizer = "sentencepiece"
vocabulary_size = 300
[train]
steps = 6
batch = 4
log_every = 2
[checkpoint]
every = 2
)";

// A folder with a text of 8000 bytes, an experiment on it, and a cache of its own.
struct PieceFolder {
  ScratchFolder folder;
  std::string text = folder.put("text", wordy_text(8000));
  std::string config = folder.put("exp.toml", kPieceTables);
  Environment cache{"MOELAB_CACHE", folder / "cache"};
  std::string run = folder / "run";

  Experiment experiment(std::vector<std::string> set = {}) const { return load_experiment(load_config(config, set)); }
  ProgramResult program(const std::vector<std::string>& arguments) const { return run_moelab(arguments, folder.path()); }
  ProgramResult trained(const std::string& to, std::vector<std::string> more = {}) const {
    more.insert(more.begin(), {"run", config, "--quiet", "--out", to});
    return program(more);
  }
};

bool says(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

// Every token equally likely.
struct UniformModel : Model {
  explicit UniformModel(int64_t vocabulary) : vocabulary_(vocabulary) {}
  ModelOutput forward(const Batch& batch, const StepContext&) const override {
    return {at::zeros({batch.tokens_BL.size(0), batch.tokens_BL.size(1), vocabulary_}, at::kDouble), {}};
  }
  Tensor decode(const Tensor&, DecodeState&) const override { return at::zeros({1, vocabulary_}); }
  std::vector<Site*> sites() const override { return {}; }
  int64_t context() const override { return 12; }
  int64_t active_parameters() const override { return 0; }
  double flops_per_token() const override { return 0; }
  int64_t vocabulary_;
};

Evaluation uniform_evaluation(const Dataset& data, int64_t sequences = 0) {
  return evaluate(UniformModel(data.vocabulary()), data, {sequences, 5, 0}, *single_comm());
}

TEST_CASE("bits per byte are all bits over all predicted bytes: a uniform model, by hand") {
  const PieceFolder in;
  const Experiment bytes = in.experiment({"data.tokenizer=bytes"}), pieces = in.experiment();
  // 400 bytes are held out. One of 256 bytes costs 8 bits.
  const Evaluation by_byte = uniform_evaluation(*bytes.data);
  CHECK(by_byte.tokens == 400);
  CHECK(by_byte.bytes == 400);
  CHECK(far(by_byte.bits_per_byte, 8) < 1e-12);
  // N pieces, one of 300 each, stand for the same 400 bytes.
  const Evaluation by_piece = uniform_evaluation(*pieces.data);
  const int64_t count = std::ssize(pieces.data->validation_tokens());
  REQUIRE(count < 300);
  CHECK(by_piece.tokens == count);
  CHECK(by_piece.bytes == 400);
  CHECK(far(by_piece.bits_per_byte, static_cast<double>(count) * std::log2(300.0) / 400) < 1e-12);
  // The first two sequences of 12: the bytes of their own 24 pieces.
  const Evaluation start = uniform_evaluation(*pieces.data, 2);
  std::vector<int64_t> first;
  for (size_t i = 0; i < 24; ++i) first.push_back(pieces.data->validation_tokens()[i]);
  CHECK(start.tokens == 24);
  CHECK(start.bytes == static_cast<double>(pieces.data->text_of(first).size()));
  CHECK(far(start.bits_per_byte, 24 * std::log2(300.0) / start.bytes) < 1e-12);
}

TEST_CASE("bits per byte of a token file: 3 bits a token, 2.5 bytes a token") {
  const ScratchFolder folder;
  const std::string file = folder.put("t.bin", [] {
    std::string bytes;
    for (int i = 0; i < 200; ++i) bytes += {static_cast<char>(i % 8), '\0'};
    return bytes;
  }());
  const auto evaluation = [&](double bytes_per_token) {
    return uniform_evaluation(*data_tests::make("tokens", 12, {{"path", file}, {"validation", 0.2},
                                                               {"bytes_per_token", bytes_per_token}}));
  };
  CHECK(evaluation(2.5).tokens == 40);
  CHECK(far(evaluation(2.5).bits_per_byte, 3 / 2.5) < 1e-12);
  CHECK(std::isnan(evaluation(0).bits_per_byte));
  CHECK(far(evaluation(0).loss, 3 * std::log(2.0)) < 1e-12);
}

TEST_CASE("ranks that share an evaluation agree on its bytes") {
  const PieceFolder in;
  const Experiment e = in.experiment();
  const Evaluation alone = uniform_evaluation(*e.data);
  run_on_threads(2, [&](std::shared_ptr<Comm> comm) {
    const Evaluation shared = evaluate(UniformModel(e.data->vocabulary()), *e.data, {0, 5, 0}, *comm);
    CHECK(shared.bytes == alone.bytes);
    CHECK(far(shared.bits_per_byte, alone.bits_per_byte) < 1e-12);
  });
}

TEST_CASE("the hash router deals out the pieces by their counts in the training split") {
  const PieceFolder in;
  const Experiment e = in.experiment();
  const Tensor counts_V = e.data->token_counts_V();
  const Tensor table_V = e.model->buffers().at(0).tensor;
  REQUIRE(table_V.numel() == 300);
  const Tensor load_E = at::zeros({4}, at::kLong).index_add(0, table_V, counts_V);
  const auto most = counts_V.max().item<int64_t>();
  CHECK(load_E.sum().item<int64_t>() == std::ssize(e.data->train_tokens()));
  CHECK((load_E.max() - load_E.min()).item<int64_t>() <= most);  // greedy: never farther apart than one token's count
}

void check_same_run(const std::string& a, const std::string& b) {
  CHECK(checkpoint_files(a) == checkpoint_files(b));
  CHECK(timeless_metrics(a) == timeless_metrics(b));
  CHECK(timeless_summary(a) == timeless_summary(b));
}

TEST_CASE("a run on pieces is bitwise the same twice, with a filled cache, without one, and resumed from each checkpoint") {
  const PieceFolder in;
  REQUIRE(in.trained(in.run).code == 0);
  REQUIRE(in.trained(in.folder / "again").code == 0);
  check_same_run(in.folder / "again", in.run);
  std::filesystem::remove_all(in.folder / "cache");
  REQUIRE(in.trained(in.folder / "fresh").code == 0);
  check_same_run(in.folder / "fresh", in.run);
  CHECK(text_of(in.folder / "fresh/tokenizer.model") == text_of(in.run + "/tokenizer.model"));

  std::filesystem::remove_all(in.folder / "cache");
  for (const std::string kept : {"2", "4"}) {
    const std::string stopped = in.folder / ("stopped" + kept);
    REQUIRE(in.trained(stopped, {"--set", "checkpoint.keep_last=9"}).code == 0);
    for (const std::string later : {"4", "6"})
      if (later > kept) std::filesystem::remove_all(stopped + "/ckpt/step-" + later);
    std::filesystem::remove_all(in.folder / "cache");
    REQUIRE(in.program({"resume", stopped, "--quiet"}).code == 0);
    CHECK_FALSE(std::filesystem::exists(in.folder / "cache"));  // the run's own model was used
    CHECK(text_of(stopped + "/ckpt/step-6/model.safetensors") == text_of(in.run + "/ckpt/step-6/model.safetensors"));
    CHECK(text_of(stopped + "/ckpt/step-6/optimizer.safetensors") == text_of(in.run + "/ckpt/step-6/optimizer.safetensors"));
    CHECK(timeless_metrics(stopped) == timeless_metrics(in.run));
  }
}

TEST_CASE("eval of a run on pieces prints what the run ended with, and the sample is text") {
  const PieceFolder in;
  const ProgramResult run = in.program({"run", in.config, "--quiet", "--out", in.run, "--set", "eval.baseline=ngram"});
  REQUIRE(run.code == 0);
  const nlohmann::json summary = nlohmann::json::parse(text_of(in.run + "/summary.json"));
  const ProgramResult eval = in.program({"eval", in.run, "--json"});
  REQUIRE(eval.code == 0);
  CHECK(nlohmann::json::parse(eval.out).at("eval.bits_per_byte") == summary.at("eval.bits_per_byte"));
  CHECK(summary.at("eval.bytes") == 400);
  CHECK(summary.at("eval.tokens") < 300);
  CHECK(summary.at("baseline.ngram.context_1.bits_per_byte").is_number());
  CHECK(says(run.out, fmt::format("validation bits per byte, 400 bytes in {} tokens:", summary.at("eval.tokens").dump())));
  CHECK(says(run.out, "what the model writes (200 bytes):"));
}

TEST_CASE("a run whose text or tokenizer has changed is not gone on with") {
  const PieceFolder in;
  REQUIRE(in.trained(in.run).code == 0);
  const std::string good = text_of(in.run + "/tokenizer.model");
  const auto refused = [&](const std::string& command) {
    const ProgramResult result = in.program({command, in.run});
    CAPTURE(result.err);
    CHECK(result.code == 5);
    CHECK(std::count(result.err.begin(), result.err.end(), '\n') == 1);
    return result.err;
  };
  in.folder.put("run/tokenizer.model", good.substr(0, good.size() / 2));
  for (const char* command : {"resume", "eval"})
    CHECK(says(refused(command), "the SentencePiece model of an earlier run is damaged"));
  in.folder.put("run/tokenizer.model", good);
  in.folder.put("text", wordy_text(7999) + "?");
  for (const char* command : {"resume", "eval"})
    CHECK(says(refused(command), "was trained on other data than its config finds now"));
  in.folder.put("text", wordy_text(8000));
  CHECK(in.program({"eval", in.run, "--json"}).code == 0);
}

TEST_CASE("a vocabulary that does not fit is refused at its place, and nothing is created") {
  const PieceFolder in;
  const auto line = [&](int64_t size) {
    const std::string text = fmt::format("extends = \"exp.toml\"\n[data]\nvocabulary_size = {}\n", size);
    const std::string start = "moelab: " + in.folder.put("bad.toml", text);
    const ProgramResult result = in.program({"run", in.folder / "bad.toml", "--out", in.run});
    CHECK(result.code == 2);
    CHECK(std::count(result.err.begin(), result.err.end(), '\n') == 1);
    CHECK_FALSE(std::filesystem::exists(in.run));
    return result.err.starts_with(start) ? result.err.substr(start.size()) : result.err;
  };
  CHECK(line(260).starts_with(":3:1: `vocabulary_size` = 260 is too small: "));
  CHECK(line(60000).starts_with(":3:1: `vocabulary_size` = 60000 is too large: "));
  CHECK(line(256).starts_with(":3:1: 'vocabulary_size' is 256, but must be "));
}

TEST_CASE("data tokenize writes files that train the same model, bit for bit") {
  const std::string tokenizer = GENERATE("sentencepiece", "bytes");
  const PieceFolder in;
  const ProgramResult written =
      in.program({"data", "tokenize", in.config, "--out", in.folder / "tok", "--set", "data.tokenizer=" + tokenizer});
  REQUIRE(written.code == 0);
  std::string tables = kPieceTables;
  const size_t data = tables.find("[data]"), train = tables.find("[train]");
  in.folder.put("tokens.toml", tables.substr(0, data) + written.out + tables.substr(train));
  REQUIRE(in.trained(in.run, {"--set", "data.tokenizer=" + tokenizer}).code == 0);
  const ProgramResult again = in.program({"run", in.folder / "tokens.toml", "--quiet", "--out", in.folder / "from_files"});
  CAPTURE(written.out, again.err);
  REQUIRE(again.code == 0);
  CHECK(text_of(in.folder / "from_files/ckpt/step-6/model.safetensors") == text_of(in.run + "/ckpt/step-6/model.safetensors"));
  const auto summary = [](const std::string& run) { return nlohmann::json::parse(text_of(run + "/summary.json")); };
  const nlohmann::json ours = summary(in.run), theirs = summary(in.folder / "from_files");
  CHECK(ours.at("eval.loss") == theirs.at("eval.loss"));
  CHECK(far(theirs.at("eval.bits_per_byte").get<double>(), ours.at("eval.bits_per_byte").get<double>()) < 1e-12);
  CHECK(std::filesystem::exists(in.folder / "tok/tokenizer.model") == (tokenizer == "sentencepiece"));
  const ProgramResult twice = in.program({"data", "tokenize", in.config, "--out", in.folder / "tok"});
  CHECK(twice.code == 2);
  CHECK(says(twice.err, "tok/train.bin exists already"));
}

TEST_CASE("token files hold each token in two bytes, and data without an end are refused") {
  const PieceFolder in;
  const std::string to = in.folder / "tok", text = wordy_text(8000);
  REQUIRE(in.program({"data", "tokenize", in.config, "--out", to, "--set", "data.tokenizer=bytes", "--json"}).code == 0);
  const std::string bin = text_of(to + "/train.bin") + text_of(to + "/validation.bin");
  REQUIRE(bin.size() == 16000);
  for (size_t i = 0; i < text.size(); ++i) {
    REQUIRE(bin[2 * i] == text[i]);
    REQUIRE(bin[2 * i + 1] == '\0');
  }
  const std::string endless = in.folder.put("markov.toml", "[data]\nname = \"markov\"\n");
  const ProgramResult refused = in.program({"data", "tokenize", endless, "--out", in.folder / "none"});
  CHECK(refused.code == 2);
  CHECK(refused.err == "moelab: " + endless + ":2:1: these data have no end that a file could hold; name a text\n");
  CHECK_FALSE(std::filesystem::exists(in.folder / "none"));
}

TEST_CASE("a composed run goes on bitwise from the middle of any epoch") {
  const std::string composer = GENERATE("random", "similarity");
  const ScratchFolder folder;
  for (int d = 0; d < 24; ++d) folder.put(fmt::format("text/{}", d), wordy_text(100, static_cast<uint32_t>(d + 1)));
  const std::vector<std::string> set{"data.name=bytes", fmt::format("data.path={}", folder / "text"), "data.composer=" + composer,
                                     "train.steps=60", "checkpoint.every=25", "checkpoint.keep_last=9"};
  const auto experiment = [&] { return tiny_experiment("switch", set); };  // 192 sequences an epoch: 48 steps
  const Experiment e = experiment();
  Trainer whole = trainer_of(e, folder / "ckpt");
  whole.run();
  for (const char* step : {"25", "50"}) {
    const Experiment later = experiment();
    Trainer resumed = trainer_of(later);
    resumed.resume(load_checkpoint(folder / fmt::format("ckpt/step-{}", step)));
    resumed.run();
    CHECK(bitwise_equal(state_of(resumed), state_of(whole)));
  }
}

}  // namespace
}  // namespace moelab::test
