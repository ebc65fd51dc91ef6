#include <cmath>
#include <complex>
#include <vector>

#include "core/base/error.h"
#include "core/base/rng.h"
#include "core/base/vector_math.h"
#include "core/policy/evictor.h"
#include "core/policy/policies/policies.h"
#include "core/policy/query_centres.h"
#include "core/policy/scoring/reduce.h"

namespace kvlapse {
namespace {

// What the mean query would give a key at the coming distances, and what queries' lengths add beyond their
// mean. Keys are rotated as they are stored, so the mean over distances is one product with the mean query
// rotated to the newest token and the mean distance behind it.
class TriAttention final : public Policy {
 public:
  TriAttention(PolicyInfo info, std::shared_ptr<const QueryCentres> centres)
      : Policy(std::move(info)), centres_(std::move(centres)) {
    if (!centres_) return;
    const int half = centres_->head_dim / 2;
    for (int j = 0; j < half; ++j) {
      const double frequency = std::pow(centres_->rope_theta, -2.0 * j / centres_->head_dim);
      frequencies_.push_back(frequency);
      std::complex<double> mean = 0;
      int n = 0;
      for (double distance = 1; distance <= parameter("farthest"); distance *= 2, ++n)
        mean += std::polar(1.0, frequency * distance);
      reach_.push_back(mean / static_cast<double>(n));
    }
  }

  void check_model(const CacheGeometry& g, double rope_theta) const override {
    if (!centres_)
      fail(
          "policy triattention: calibration: expected a file that `kvlapse calibrate` made of another "
          "recording (triattention:calibration=FILE), found none");
    if (centres_->n_layers != g.n_layers || centres_->n_q_heads != g.n_q_heads ||
        centres_->head_dim != g.head_dim)
      fail("policy triattention: calibration: expected {} layers, {} query heads of {}, found {}, {} of {}",
           g.n_layers, g.n_q_heads, g.head_dim, centres_->n_layers, centres_->n_q_heads, centres_->head_dim);
    if (centres_->rope_theta != rope_theta)
      fail("policy triattention: calibration: expected the model's RoPE base {}, found {}", rope_theta,
           centres_->rope_theta);
  }

  void score(const LayerContext& at, LayerInputs& inputs, const SlotState&, Scores& out) const override {
    const size_t d = static_cast<size_t>(at.geometry.head_dim), half = d / 2;
    std::vector<std::complex<double>> turn(half);  // to the newest token and the distances behind it
    for (size_t j = 0; j < half; ++j) turn[j] = reach_[j] * std::polar(1.0, frequencies_[j] * raw(at.step));
    const Protection protection(at, at.rule);
    const auto seed = static_cast<uint64_t>(parameter("seed"));
    const auto noise = static_cast<float>(parameter("noise"));
    std::vector<float> query(d), extra(half), lengths, values;
    int lengths_of = -1;
    for (int r = 0; r < out.n_rows(); ++r) {
      const std::span<float> row = out.row(r);
      const std::span<const Pos> positions = at.positions(r);
      values.resize(row.size());
      reduce_heads(q_heads_of(at, out, r), at.rule.gqa, row, [&](int q) {
        const int h = at.geometry.kv_head_of(q);
        const std::span<const float> keys = inputs.keys(h);
        if (h != lengths_of) pair_lengths(keys, d, lengths);
        lengths_of = h;
        const std::span<const float> centre = centres_->centre_of(at.layer, q),
                                     magnitude = centres_->magnitude_of(at.layer, q);
        for (size_t j = 0; j < half; ++j) {
          const std::complex<double> mean(centre[j], centre[j + half]), placed = mean * turn[j];
          query[j] = static_cast<float>(placed.real());
          query[j + half] = static_cast<float>(placed.imag());
          extra[j] = static_cast<float>(magnitude[j] - std::abs(mean));
        }
        for (size_t i = 0; i < values.size(); ++i)
          values[i] = dot(query.data(), &keys[i * d], d) + dot(extra.data(), &lengths[i * half], half);
        standardise(positions, protection, values);
        return std::span<const float>(values);
      });
      for (size_t i = 0; i < row.size(); ++i)
        row[i] +=
            noise * (unit_float(counter_random({seed, static_cast<uint64_t>(at.layer),
                                                static_cast<uint64_t>(r), static_cast<uint64_t>(raw(at.step)),
                                                static_cast<uint64_t>(raw(positions[i]))})) -
                     0.5f);
    }
  }

 private:
  // [n, D/2] absolute values of the keys' pairs.
  static void pair_lengths(std::span<const float> keys, size_t d, std::vector<float>& out) {
    const size_t half = d / 2;
    out.resize(keys.size() / 2);
    for (size_t i = 0; i < keys.size() / d; ++i)
      for (size_t j = 0; j < half; ++j) {
        const float a = keys[i * d + j], b = keys[i * d + j + half];
        out[i * half + j] = std::sqrt(a * a + b * b);
      }
  }

  // Mean 0 and deviation 1 over the tokens that may go.
  static void standardise(std::span<const Pos> positions, const Protection& protection,
                          std::span<float> values) {
    double n = 0, sum = 0, squares = 0;
    for (size_t i = 0; i < values.size(); ++i)
      if (!protection.holds(positions[i])) n += 1, sum += values[i];
    if (n < 1) return;
    const double mean = sum / n;
    for (size_t i = 0; i < values.size(); ++i)
      if (!protection.holds(positions[i])) squares += (values[i] - mean) * (values[i] - mean);
    const double deviation = std::max(std::sqrt(squares / n), 1e-6);
    for (float& v : values) v = static_cast<float>((v - mean) / deviation);
  }

  std::shared_ptr<const QueryCentres> centres_;
  std::vector<double> frequencies_;          // [D/2] radians a position
  std::vector<std::complex<double>> reach_;  // [D/2] mean rotation over the coming distances
};

}  // namespace

PolicyInfo triattention_info() {
  PolicyInfo info;
  info.name = "triattention";
  info.summary =
      "attention expected from the mean query of each head, fitted beforehand, compacted every 128 tokens";
  info.formula =
      "per query head z-normalised sum over RoPE pairs f of |E q_f| |k_f| mean over d of cos(w_f (t - p + d) "
      "+ "
      "arg(E q_f conj k_f)) + (E |q_f| - |E q_f|) |k_f|, q and k without rotation, d = 1, 2, 4 .. farthest; "
      "score = max over the group";
  info.paper = "arXiv 2604.04921";
  info.source = "WeianMao/triattention c3744ee";
  info.deviations = {
      "needs the mean queries of the model (`kvlapse calibrate` fits them on recordings); scoring a "
      "recording "
      "that they were fitted on is refused unless same_trace=allow says so",
      "the pinned prompt counts against the budget",
      "z-normalised over the tokens that may go, deviation by n; ties are broken by noise drawn from (seed, "
      "layer, head, step, position)"};
  info.parameters = {
      {"farthest", 65536, 1, 1 << 24, "largest coming distance; distances are powers of two"},
      {"noise", 1e-6, 0, 1, "width of the noise that breaks ties"},
      {"seed", 0, 0, 1e9, "of that noise"},
      {"same_trace", 0, 0, 1, "a recording that the calibration was fitted on", {"refuse", "allow"}}};
  info.texts = {{"calibration", "", "file of query centres, by `kvlapse calibrate`"},
                {"fit", "", "its id; given, another file is refused"}};
  info.rule.cadence = 128;
  info.rule.headroom = 0;
  info.rule.gqa = GqaRule::max;
  info.rule.reclaim = Reclaim::compact;
  info.rule.pin_prompt = true;
  info.signals = Signal::keys | Signal::rope;
  return info;
}

std::unique_ptr<Policy> make_triattention(PolicyInfo info) {
  std::shared_ptr<const QueryCentres> centres;
  if (const std::string& file = info.texts[0].value; !file.empty()) {
    const std::string id = query_centres_id(file);
    if (!info.texts[1].value.empty() && info.texts[1].value != id)
      fail("policy triattention: calibration {}: expected the file with id {}, found {}", file,
           info.texts[1].value, id);
    info.texts[1].value = id;
    centres = std::make_shared<QueryCentres>(QueryCentres::read(file));
    info.fitted_on = centres->traces;
    info.fitted_on.insert(info.fitted_on.end(), centres->tokens.begin(), centres->tokens.end());
    info.allows_fitted = info.parameters[3].value != 0;
  }
  return std::make_unique<TriAttention>(std::move(info), std::move(centres));
}

}  // namespace kvlapse
