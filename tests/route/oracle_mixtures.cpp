#include "oracle_mixtures.h"

#include "oracle_parts.h"

namespace moelab::oracle {
namespace {

Vec softmax_column(const Mat& logits, size_t column) {
  Vec z;
  for (const Vec& row : logits) z.push_back(row[column]);
  return softmax(z);
}

// out += factor · weight·x
void add_product(Vec& out, Dual factor, const Mat& weight, const Vec& x) {
  for (size_t i = 0; i < out.size(); ++i) out[i] += factor * dot(weight[i], x);
}

// One linear map whose parameters are Σ_e alpha_e of the experts'.
Vec mixed_linear(const Inputs& in, const std::string& map, const Vec& alpha, const Vec& x, size_t outputs) {
  Vec out(outputs);
  for (size_t e = 0; e < alpha.size(); ++e) {
    add_product(out, alpha[e], in.matrix("experts.w_" + map, e), x);
    const Vec bias = in.vector("experts.b_" + map, e);
    for (size_t i = 0; i < outputs; ++i) out[i] += alpha[e] * bias[i];
  }
  return out;
}

Vec mixed_expert(const MixtureLayer& layer, const Inputs& in, const Vec& alpha, const Vec& x) {
  Vec hidden = mixed_linear(in, "in", alpha, x, layer.width);
  for (Dual& one : hidden) one = one * normal_cdf(one);
  return mixed_linear(in, "out", alpha, hidden, x.size());
}

Vec one_hot(int64_t length, int64_t place) {
  Vec v(length);
  v[place] = 1;
  return v;
}

Vec direction(const MixtureLayer& layer, const Vec& row) {
  if (!layer.normalise) return row;
  Vec unit;
  for (const Dual& one : row) unit.push_back(one / square_root(dot(row, row) + Dual(layer.normalise_eps)));
  return unit;
}

// One sequence: its rows in IN.
class SoftSequence {
 public:
  SoftSequence(const MixtureLayer& layer, const Inputs& in, std::vector<size_t> rows)
      : layer_(layer), in_(in), rows_(std::move(rows)), x_(in.matrix("x")) {
    const Mat phi = in.matrix("router.phi");
    for (const size_t t : rows_) {
      logits_.emplace_back();
      for (size_t s = 0; s < phi.size(); ++s) {
        Dual logit = in.at("router.scale", 0) * dot(direction(layer, x_[t]), direction(layer, phi[s]));
        if (layer.train && layer.noise_std > 0) logit += Dual(layer.noise_std) * in.at("noise", t * phi.size() + s);
        logits_.back().push_back(logit);
      }
    }
  }

  void write(MixtureResult& result) const {
    const size_t slots = logits_[0].size();
    Mat read(slots, Vec(x_[0].size())), written;
    for (size_t s = 0; s < slots; ++s) {
      for (size_t m = 0; m < rows_.size(); ++m) {
        const Dual weight = weight_of(layer_.dispatch, m, s, softmax_column(logits_, s)[m], rows_.size());
        result.dispatch[rows_[m]][s] = weight;
        for (size_t d = 0; d < read[s].size(); ++d) read[s][d] += weight * x_[rows_[m]][d];
      }
      written.push_back(mixed_expert(layer_, in_, one_hot(layer_.experts, s / layer_.slots_per_expert), read[s]));
    }
    for (size_t m = 0; m < rows_.size(); ++m)
      for (size_t s = 0; s < slots; ++s) {
        const Dual weight = weight_of(layer_.combine, m, s, softmax(logits_[m])[s], slots);
        result.combine[rows_[m]][s] = weight;
        for (size_t d = 0; d < read[s].size(); ++d) result.y[rows_[m]][d] += weight * written[s][d];
      }
    result.slots.push_back(read);
  }

 private:
  static Dual weight_of(const std::string& kind, size_t m, size_t s, Dual soft, size_t count) {
    if (kind == "identity") return m == s ? 1.0 : 0.0;
    return kind == "uniform" ? Dual(1.0 / static_cast<double>(count)) : soft;
  }

  const MixtureLayer& layer_;
  const Inputs& in_;
  std::vector<size_t> rows_;
  Mat x_;
  Mat logits_;
};

// What a merging router decides from: rows of one sequence and segment.
struct Segment {
  int64_t sequence, number;
  std::vector<size_t> rows;
};

int64_t segment_number(const MixtureLayer& layer, const Inputs& in, const Rows& rows, size_t t) {
  if (layer.router == "smear" || (layer.prompt && !layer.train)) return 0;
  if (in.has("segment_ids")) return static_cast<int64_t>(in.at("segment_ids", rows.file_row[t]).v);
  return rows.position[t] / layer.segment_length;
}

std::vector<Segment> segments_of(const MixtureLayer& layer, const Inputs& in, const Rows& rows, MixtureResult& result) {
  std::vector<Segment> all;
  for (size_t t = 0; t < rows.count(); ++t) {
    const bool one_for_all = layer.router == "thor";
    const int64_t sequence = one_for_all ? 0 : rows.sequence[t], number = one_for_all ? 0 : segment_number(layer, in, rows, t);
    size_t g = 0;
    while (g < all.size() && (all[g].sequence != sequence || all[g].number != number)) ++g;
    if (g == all.size()) all.push_back({sequence, number, {}});
    all[g].rows.push_back(rows.file_row[t]);
    result.group_of_token[rows.file_row[t]] = static_cast<int64_t>(g);
  }
  return all;
}

Vec segment_mixture(const Inputs& in, const Segment& segment) {
  const Mat x = in.matrix("x");
  Vec mean(x[0].size());
  for (const size_t t : segment.rows)
    for (size_t d = 0; d < mean.size(); ++d) mean[d] += x[t][d] / Dual(static_cast<double>(segment.rows.size()));
  Vec logits;
  for (const Vec& row : in.matrix("router.weight")) logits.push_back(dot(row, mean));
  return softmax(logits);
}

Vec mixture_of(const MixtureLayer& layer, const Inputs& in, const std::vector<Segment>& all, const Segment& segment) {
  const bool reads_itself = layer.router == "smear" || (layer.prompt && !layer.train);
  const Segment* before = nullptr;
  for (const Segment& other : all)
    if (other.sequence == segment.sequence && other.number < segment.number && (!before || other.number > before->number))
      before = &other;
  if (reads_itself) return segment_mixture(in, segment);
  if (before) return segment_mixture(in, *before);
  Vec first(layer.experts, Dual(1.0 / static_cast<double>(layer.experts)));
  if (layer.own_first) first = segment_mixture(in, segment);
  for (Dual& one : first) one.d = 0;
  return first;
}

void write_merged(const MixtureLayer& layer, const Inputs& in, const Rows& rows, MixtureResult& result) {
  const std::vector<Segment> all = segments_of(layer, in, rows, result);
  const Mat x = in.matrix("x");
  for (const Segment& segment : all) {
    const Vec alpha = mixture_of(layer, in, all, segment);
    result.alpha.push_back(alpha);
    for (const size_t t : segment.rows) {
      result.y[t] = mixed_expert(layer, in, alpha, x[t]);
      for (const Dual& p : alpha) result.entropy += Dual(-1.0 / static_cast<double>(rows.count())) * p * log(p);
    }
  }
}

void write_soft(const MixtureLayer& layer, const Inputs& in, const Rows& rows, MixtureResult& result) {
  for (int64_t b = 0; b < rows.sequences; ++b) {
    std::vector<size_t> members;
    for (size_t t = 0; t < rows.count(); ++t)
      if (rows.sequence[t] == b) members.push_back(rows.file_row[t]);
    SoftSequence(layer, in, members).write(result);
  }
}

}  // namespace

MixtureResult evaluate(const MixtureLayer& layer, const Arrays& arrays, const std::string& seed, size_t index) {
  const Inputs in{arrays, seed, index};
  const Rows rows = routed_rows(in);
  const size_t file_rows = arrays.at("x").shape[0], width = arrays.at("x").shape[1];
  const size_t slots = layer.experts * layer.slots_per_expert;
  MixtureResult result;
  result.dispatch = result.combine = Mat(file_rows, Vec(slots));
  result.group_of_token.assign(file_rows, -1);
  result.y = Mat(file_rows, Vec(width));
  if (layer.router == "soft_moe") write_soft(layer, in, rows, result);
  else write_merged(layer, in, rows, result);
  for (size_t t = 0; t < file_rows; ++t)
    for (size_t d = 0; d < width; ++d) result.objective += result.y[t][d] * in.at("grad_y", t * width + d);
  result.objective += Dual(layer.entropy) * result.entropy;
  return result;
}

std::vector<double> gradient(const MixtureLayer& layer, const Arrays& in, const std::string& name) {
  std::vector<double> g;
  for (size_t i = 0; i < in.at(name).value.size(); ++i) g.push_back(evaluate(layer, in, name, i).objective.d);
  return g;
}

}  // namespace moelab::oracle
