#include <vector>

#include "core/policy/policies/policies.h"
#include "core/policy/scoring/window_vote.h"

namespace kvlapse {
namespace {

// R-KV's SnapKV baseline: R-KV's importance alone.
class SnapKv : public Policy {
 public:
  using Policy::Policy;
  void score(const LayerContext& at, LayerInputs& inputs, const SlotState&, Scores& out) const override {
    const int window = static_cast<int>(parameter("window")), kernel = static_cast<int>(parameter("kernel"));
    std::vector<float> rows;
    for (int r = 0; r < out.n_rows(); ++r) {
      const int n = static_cast<int>(out.row(r).size()), prefix = n - std::min(window, n);
      const int n_rows = window_logits_of(q_heads_of(at, out, r), at.rule.gqa, inputs, window, n, rows);
      std::vector<float> importance(prefix);
      vote(rows, n_rows, n, prefix, /*mean=*/true, importance);
      max_pool(importance, kernel, out.row(r).first(prefix));
    }
  }
};

// Layers near the input get more: budgets fall linearly with depth, their mean is the budget.
class PyramidKv final : public SnapKv {
 public:
  using SnapKv::SnapKv;
  int layer_budget(int layer, int n_layers, int budget) const override {
    if (n_layers < 2) return budget;
    const int window = static_cast<int>(parameter("window"));
    const double least = (budget - window) / parameter("beta"), most = 2.0 * (budget - window) - least;
    const int slots = static_cast<int>(most - layer * (most - least) / (n_layers - 1)) + window;
    return std::max(slots, window + 1 + info().rule.headroom);
  }
};

// kvpress: probabilities over all held slots, the window's columns dropped, average pooled, mean over the
// group.
class SnapKvPress final : public Policy {
 public:
  using Policy::Policy;
  void score(const LayerContext& at, LayerInputs& inputs, const SlotState&, Scores& out) const override {
    const int window = static_cast<int>(parameter("window")), kernel = static_cast<int>(parameter("kernel"));
    for (int r = 0; r < out.n_rows(); ++r) {
      const int n = static_cast<int>(out.row(r).size()), prefix = n - std::min(window, n);
      std::vector<float> importance(prefix), pooled(prefix);
      reduce_heads(q_heads_of(at, out, r), at.rule.gqa, out.row(r).first(prefix), [&](int q) {
        std::span<const float> rows = inputs.window_logits(q, window);
        vote(rows, static_cast<int>(rows.size()) / n, n, n, /*mean=*/true, importance);
        average_pool(importance, kernel, pooled);
        return std::span<const float>(pooled);
      });
    }
  }
};

PolicyInfo decode_form(PolicyInfo info) {
  info.rule.cadence = 128;
  info.rule.headroom = 0;
  info.signals = static_cast<SignalSet>(Signal::query_window);
  return info;
}

}  // namespace

PolicyInfo snapkv_zefan_cai_info() {
  PolicyInfo info = decode_form({});
  info.name = "snapkv";
  info.reference = "zefan-cai";
  info.summary = "importance to the last queries, max pooled, compacted every 128 tokens";
  info.formula =
      "I = maxpool(mean over the window of softmax(max over the group of q.k / sqrt(D))) without the "
      "window's own slots";
  info.paper = "arXiv 2404.14469 (prefill); decode form of arXiv 2505.24133";
  info.source = "Zefan-Cai/R-KV d15c976, rkv/compression/snapkv.py";
  info.deviations = {
      "window 8 and max pool 7 as in R-KV's baseline; SnapKV's own class has window 64 and average pool 5 "
      "(snapkv@kvpress)",
      "pooling makes exact ties: ties=torch reproduces torch.topk's choice on the CPU",
      "gqa reduces raw logits before the softmax"};
  info.parameters = {{"window", 8, 1, 1024, "last queries that vote; their tokens are kept"},
                     {"kernel", 7, 1, 255, "width of the max pool, odd"}};
  info.rule.gqa = GqaRule::max;
  info.rule.reclaim = Reclaim::compact_by_score;
  info.rule.ties = TieOrder::torch;
  return info;
}

std::unique_ptr<Policy> make_snapkv_zefan_cai(PolicyInfo info) {
  adopt_window(info, info.parameters[0].value);
  return std::make_unique<SnapKv>(std::move(info));
}

PolicyInfo snapkv_kvpress_info() {
  PolicyInfo info = decode_form({});
  info.name = "snapkv";
  info.reference = "kvpress";
  info.summary =
      "attention of the last queries over all held tokens, average pooled, compacted every 128 tokens";
  info.formula =
      "mean over the group of avgpool(mean over the window of softmax(q.k / sqrt(D))); the window is kept";
  info.paper = "arXiv 2404.14469";
  info.source = "NVIDIA/kvpress 0.5.5, presses/snapkv_press.py in DecodingPress";
  info.deviations = {
      "the cache stays in position order (DecodingPress leaves it in score order)",
      "each window query keeps its own rotation (DecodingPress rotates all to the current position)"};
  info.parameters = {{"window", 64, 1, 1024, "last queries that vote; their tokens are kept"},
                     {"kernel", 5, 1, 255, "width of the average pool, odd"}};
  info.rule.reclaim = Reclaim::compact;
  return info;
}

std::unique_ptr<Policy> make_snapkv_kvpress(PolicyInfo info) {
  adopt_window(info, info.parameters[0].value);
  return std::make_unique<SnapKvPress>(std::move(info));
}

PolicyInfo pyramidkv_info() {
  PolicyInfo info = decode_form({});
  info.name = "pyramidkv";
  info.summary = "SnapKV scores, budgets that fall linearly from the first layer to the last";
  info.formula =
      "budget(l) = window + max - l (max - min) / (L - 1), min = (B - window) / beta, max = 2 (B - window) - "
      "min; scores "
      "as snapkv";
  info.paper = "arXiv 2406.02069";
  info.source = "Zefan-Cai/KVCache-Factory (budgets), Zefan-Cai/R-KV d15c976 (decode form of the scores)";
  info.deviations = {
      "the original compresses the prompt once; here every layer keeps to its budget while decoding",
      "rounding down leaves up to one slot a layer unused"};
  info.parameters = {{"window", 8, 1, 1024, "last queries that vote; their tokens are kept"},
                     {"kernel", 7, 1, 255, "width of the max pool, odd"},
                     {"beta", 20, 1, 1000, "how much smaller than the budget the last layer's share is"}};
  info.rule.gqa = GqaRule::max;
  info.rule.reclaim = Reclaim::compact_by_score;
  info.rule.ties = TieOrder::torch;
  return info;
}

std::unique_ptr<Policy> make_pyramidkv(PolicyInfo info) {
  adopt_window(info, info.parameters[0].value);
  return std::make_unique<PyramidKv>(std::move(info));
}

}  // namespace kvlapse
