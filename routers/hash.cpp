// Hash layers: experts are looked up by token; nothing is learned
// Roller, Sukhbaatar, Szlam, Weston, 2021, arXiv:2106.04426
//
//   y_t = Σ_j f_{table[v_t, j]}(x_t), every gate 1;  v_t, the line of the table that a row reads:
//     balanced, random, multi: its token | previous: the token before | future: the token after (control: it leaks)
//     position: position mod V           | bigram: hash(token before, token) mod V
//   balanced: tokens by falling count in the training split, ties by lower id, each to the k experts with the least count so
//     far, ties by lower index; tokens that never occur are dealt round robin. Before the counts are known: v mod E, …
//   multi (MultiHash): hash j draws among the experts ⌊jE/k⌋ … ⌊(j+1)E/k⌋-1;  the other kinds draw k different experts
//
// The table is a buffer: checkpoints keep it, and any other one may be put there (clusters of embeddings, say).
//
// Differences from the paper: MultiHash is a sum of k experts of width f/k, which equals the paper's concatenated slices
// except that each expert adds an output bias of its own; every layer draws a table of its own; token 0 stands before the
// first token and after the last; bigram pairs share V lines; tables from clusters of embeddings are not built here.
#include "core/error.h"
#include "core/linear_router.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>

#include <fmt/format.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <set>

namespace moelab {
namespace {

enum class HashKind { kBalanced, kRandom, kBigram, kPrevious, kPosition, kFuture, kMulti };
const std::vector<std::string> kHashKindNames{"balanced", "random", "bigram", "previous", "position", "future", "multi"};
constexpr int64_t kOutsideToken = 0;  // before the first token of a sequence, and after the last
constexpr const char* kLastToken = "last_token";

HashKind hash_kind_of(const std::string& name) {
  const auto found = std::find(kHashKindNames.begin(), kHashKindNames.end(), name);
  check_invariant(found != kHashKindNames.end(), "kind = " + name);
  return static_cast<HashKind>(found - kHashKindNames.begin());
}

int64_t hash_vocabulary(const RouterSpec& spec) {
  const int64_t own = spec.options.integer("vocabulary"), lines = own > 0 ? own : spec.vocabulary;
  if (lines == 0) usage_error("[moe.router] vocabulary: router 'hash' needs the number of tokens, and no model says it");
  return lines;
}

// Tokens that occur, the most frequent first.
std::vector<int64_t> by_falling_count(const std::vector<int64_t>& count_V) {
  std::vector<int64_t> order;
  for (size_t v = 0; v < count_V.size(); ++v)
    if (count_V[v] > 0) order.push_back(static_cast<int64_t>(v));
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return count_V[a] > count_V[b]; });
  return order;
}

// Greedy balance; `count_V` has one entry per line of the table. [V,k]
Tensor balanced_table(const std::vector<int64_t>& count_V, int64_t experts, int64_t k) {
  Tensor table_VK = at::empty({static_cast<int64_t>(count_V.size()), k}, at::kLong);
  auto* table = table_VK.mutable_data_ptr<int64_t>();
  int64_t unseen = 0;
  for (size_t v = 0; v < count_V.size(); ++v)
    for (int64_t j = 0; count_V[v] == 0 && j < k; ++j) table[v * k + j] = unseen++ % experts;
  std::set<std::pair<int64_t, int64_t>> load;  // (count so far, expert)
  for (int64_t e = 0; e < experts; ++e) load.insert({0, e});
  for (const int64_t v : by_falling_count(count_V)) {
    std::vector<std::pair<int64_t, int64_t>> least;
    for (int64_t j = 0; j < k; ++j) least.push_back(load.extract(load.begin()).value());
    for (int64_t j = 0; j < k; ++j) {
      table[v * k + j] = least[j].second;
      load.insert({least[j].first + count_V[v], least[j].second});
    }
  }
  return table_VK;
}

// k different experts, uniform, for every line. [V,k]
Tensor drawn_table(RandomKey key, int64_t lines, int64_t experts, int64_t k) {
  Tensor table_VK = at::empty({lines, k}, at::kLong);
  std::vector<int64_t> expert(experts);
  for (int64_t v = 0; v < lines; ++v) {
    std::iota(expert.begin(), expert.end(), 0);
    for (int64_t j = 0; j < k; ++j) std::swap(expert[j], expert[j + uniform_integer(key, v * k + j, experts - j)]);
    std::copy_n(expert.begin(), k, table_VK.mutable_data_ptr<int64_t>() + v * k);
  }
  return table_VK;
}

// Column j: one expert of the j-th share, uniform. [V,k]
Tensor multi_table(RandomKey key, int64_t lines, int64_t experts, int64_t k) {
  Tensor table_VK = at::empty({lines, k}, at::kLong);
  for (int64_t i = 0; i < lines * k; ++i) {
    const int64_t first = i % k * experts / k, end = (i % k + 1) * experts / k;
    table_VK.mutable_data_ptr<int64_t>()[i] = first + uniform_integer(key, i, end - first);
  }
  return table_VK;
}

// [V,k], or [V] where each token has one expert.
Tensor initial_table(const RouterSpec& spec, HashKind kind) {
  require_k_fits(spec);
  const int64_t lines = hash_vocabulary(spec), k = spec.k();
  const RandomKey key = spec.init.with("table");
  Tensor table_VK;
  if (kind == HashKind::kBalanced) table_VK = balanced_table(std::vector<int64_t>(lines, 0), spec.experts, k);
  else if (kind == HashKind::kMulti) table_VK = multi_table(key, lines, spec.experts, k);
  else table_VK = drawn_table(key, lines, spec.experts, k);
  return k == 1 ? table_VK.view({lines}) : table_VK;
}

// Some entry outside 0 … end-1, if there is one.
std::optional<int64_t> outside(const Tensor& values, int64_t end) {
  if (values.numel() == 0) return {};
  const int64_t low = values.min().item<int64_t>(), high = values.max().item<int64_t>();
  if (low < 0) return low;
  return high >= end ? std::optional(high) : std::nullopt;
}

// Several experts of one line have to differ: a row uses an expert once.
void require_different(const Tensor& choice_TK) {
  if (choice_TK.size(1) < 2) return;
  if (std::get<0>(choice_TK.sort(1)).diff(1, 1).eq(0).any().item<bool>())
    usage_error("a line of the table of router 'hash' names an expert twice");
}

// The token that stands before each row in its sequence, the rows being read in `order_T`. `last_B` holds the one before the
// first row, and then the last one.
Tensor tokens_before(const RouteInput& in, const Tensor& order_T, Tensor& last_B) {
  Tensor before_T = at::empty_like(in.token_ids_T);
  const auto* order = order_T.const_data_ptr<int64_t>();
  auto* last = last_B.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < in.rows(); ++i) {
    int64_t& held = last[in.sequence_T.const_data_ptr<int64_t>()[order[i]]];
    before_T.mutable_data_ptr<int64_t>()[order[i]] = held;
    held = in.token_ids_T.const_data_ptr<int64_t>()[order[i]];
  }
  return before_T;
}

// Rows by rising position, equal ones as they lie.
Tensor rows_in_order(const RouteInput& in) { return in.position_T.argsort(/*stable=*/true, 0, /*descending=*/false); }

Tensor tokens_after(const RouteInput& in) {
  Tensor next_B = at::zeros({in.sequences}, at::kLong).add_(kOutsideToken);
  return tokens_before(in, rows_in_order(in).flip(0), next_B);
}

// A fixed function, the same for every seed, so that a checkpoint's table means the same everywhere.
Tensor bigram_lines(const Tensor& before_T, const Tensor& token_T, int64_t lines) {
  static const RandomKey key = random_key(0, "bigram");
  Tensor line_T = at::empty_like(token_T);
  const auto *before = before_T.const_data_ptr<int64_t>(), *token = token_T.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < token_T.numel(); ++t)
    line_T.mutable_data_ptr<int64_t>()[t] = uniform_integer(key, before[t] * lines + token[t], lines);
  return line_T;
}

class HashRouter : public Router {
 public:
  explicit HashRouter(const RouterSpec& spec)
      : Router(spec),
        kind_(hash_kind_of(spec.options.text("kind"))),
        table_V_(add_buffer("table", initial_table(spec, kind_))) {}

  RouterFacts facts() const override {
    RouterFacts facts = Router::facts();
    facts.needs_token_ids = kind_ != HashKind::kPosition;
    facts.looks_ahead = kind_ == HashKind::kFuture;
    facts.decodes = kind_ != HashKind::kFuture;
    return facts;
  }

  // The lines are tokens, even where there are as many of them as experts.
  std::vector<Tensor> per_expert_tensors() const override { return {}; }

  void prepare(const CorpusStatistics& statistics) override {
    if (kind_ != HashKind::kBalanced) return;
    const Tensor count_V = statistics.token_counts_V.contiguous();
    if (count_V.numel() > lines())
      usage_error(fmt::format("[moe.router] vocabulary = {}, but the data have {} tokens", lines(), count_V.numel()));
    std::vector<int64_t> counts(lines(), 0);
    std::copy_n(count_V.const_data_ptr<int64_t>(), count_V.numel(), counts.begin());
    const at::NoGradGuard no_grad;
    table_V_.copy_(balanced_table(counts, spec_.experts, spec_.k()).view_as(table_V_));
  }

  RouteOutput route(const RouteInput& in, RouteState& state) const override {
    require_finite(in.routed(), "x", in);
    const Tensor choice_TK = in.forced ? in.forced->choice_TK : choices(lines_of(in, state));
    const at::ScalarType dtype = in.routed().scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    const Tensor one_TK = at::ones(choice_TK.sizes(), dtype);
    return finish_sparse(in, spec_, {choice_TK, one_TK, one_TK, {}}, {});
  }

 private:
  int64_t lines() const { return table_V_.size(0); }

  Tensor choices(const Tensor& line_T) const {
    const Tensor choice_TK = table_V_.index_select(0, line_T).view({line_T.numel(), spec_.k()});
    if (const auto expert = outside(choice_TK, spec_.experts))
      usage_error(fmt::format("the table of router 'hash' names expert {}, but there are {}", *expert, spec_.experts));
    require_different(choice_TK);
    return choice_TK;
  }

  // Which line of the table each row reads.
  Tensor lines_of(const RouteInput& in, RouteState& state) const {
    if (kind_ == HashKind::kPosition) return in.position_T.remainder(lines());
    if (!in.token_ids_T.defined()) usage_error("router 'hash' needs token ids, and the layer was given none");
    if (const auto token = outside(in.token_ids_T, lines()))
      usage_error(fmt::format("token {} has no line in the table of router 'hash', which has {}", *token, lines()));
    if (kind_ == HashKind::kFuture) return tokens_after(in);
    if (kind_ == HashKind::kPrevious) return before(in, state);
    return kind_ == HashKind::kBigram ? bigram_lines(before(in, state), in.token_ids_T, lines()) : in.token_ids_T;
  }

  // While decoding, the last token of each sequence is kept from call to call.
  static Tensor before(const RouteInput& in, RouteState& state) {
    Tensor fresh_B = at::zeros({in.sequences}, at::kLong).add_(kOutsideToken);
    if (in.mode != Mode::kDecode) return tokens_before(in, rows_in_order(in), fresh_B);
    Tensor& kept_B = state.kept[kLastToken];
    kept_B = kept_B.defined() ? kept_B.clone() : fresh_B;  // a copy of the state may live on
    return tokens_before(in, rows_in_order(in), kept_B);
  }

  HashKind kind_;
  Tensor table_V_;  // int64; [V,k] for k > 1
};

const Registration<RouterEntry> registration_hash{{
    .name = "hash",
    .title = "Hash layers: experts looked up by token",
    .citation = "Roller et al., 2021, arXiv:2106.04426",
    .equation = "experts of row t: table[v_t], gate 1;  v_t its token, the one before or after, its position, or a hash of two",
    .facts = {.learned = false, .needs_token_ids = true, .differentiable_gate = false, .permutation_equivariant = false,
              .has_scores = false},
    .options = {option("kind", "balanced", "how the table is filled, and what reads it").one_of(kHashKindNames),
                option("vocabulary", 0, "tokens; 0 = the model's").at_least(0).as_rows_of("table"),
                k_option(1), renormalise_option("none")},
    .differences = {"MultiHash is a sum of k experts of width f/k: the paper's concatenated slices, but for k output biases",
                    "every layer draws a table of its own",
                    "token 0 stands before the first token of a sequence, and after the last",
                    "bigram: pairs are hashed to as many lines as there are tokens",
                    "tables from clusters of embeddings are not built; one may be put into the buffer"},
    .verified_with = {{{"k", int64_t{2}}}, {{"kind", std::string("multi")}, {"k", int64_t{2}}}},
    .make = [](RouterSpec spec) -> std::unique_ptr<Router> { return std::make_unique<HashRouter>(spec); },
}};

}  // namespace
}  // namespace moelab
