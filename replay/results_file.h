// Results of replays and evaluations in one SQLite file (*.kvr; tables in replay/FORMAT.md). Deterministic
// bytes: no clock, host or duration, rows in the order of their keys. While a sweep runs, the file takes
// finished cells in transactions and says complete = 0; finish() rewrites it in canonical order, so that
// neither interruptions nor the sharding leave a mark. One thread at a time.
#pragma once

#include <filesystem>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "replay/summary.h"

namespace kvlapse {

struct ResultTrace {
  std::string hash, name, model, policy, kv_dtype;
  int n_layers = 0, n_q_heads = 0, n_kv_heads = 0, head_dim = 0, n_sequences = 0;
  int64_t n_tokens = 0;
};

struct ResultCell {
  std::string id, trace, policy, budget, match = "nominal";
  int budget_slots = 0;
  double budget_share = 0;
  int layer_begin = 0, layer_end = 0;
  bool open_loop = true;
  std::string selection;                           // Sweep::selection_text; "" is everything
  std::vector<NamedValue> total;                   // over all sequences
  std::vector<std::vector<NamedValue>> sequences;  // each
  std::vector<HeadSummary> heads;
  std::vector<NamedSketch> sketches;
  std::vector<LayerSeries> series;
};

// Closed loop: one policy and budget over n problems of a task.
struct EvalRow {
  std::string model, task, policy, budget;
  int budget_slots = 0;
  int64_t seed = 0;
  int n = 0, correct = 0;
  double accuracy = 0, ci95_low = 0, ci95_high = 0, tokens_mean = 0;
  std::optional<double> length_ratio, first_divergence_median;
};

class ResultsFile {
 public:
  enum class Open { create, replace, resume };  // resume: continue a file of that name, or create it
  ResultsFile(const std::filesystem::path& file, Open how);
  ~ResultsFile();

  bool has(const std::string& cell) const;
  bool has_eval(const EvalRow& row) const;  // same model, task, policy, budget, seed and n
  // Each call is one transaction. Throws Error for a cell of another selection than the file's.
  void add(const ResultTrace& trace, const std::vector<ResultCell>& cells);
  void add(const EvalRow& row);
  // Rewrites the file in canonical order, complete. Nothing can be added afterwards.
  void finish();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// What is in a results file; heads, sketches and series only when asked for.
struct Results {
  bool complete = false;
  std::vector<ResultTrace> traces;
  std::vector<ResultCell> cells;  // by id
  std::vector<EvalRow> evals;
};
Results read_results(const std::filesystem::path& file, bool details = false);

// A file of this kind, by its application id; false for anything else, a missing file included.
bool is_results_file(const std::filesystem::path& file);

// Every invariant that a results file promises, one line per violation; empty: the file is sound.
struct ResultsReport {
  std::vector<std::string> violations;
  int64_t cells = 0, evals = 0;
  bool complete = false;
};
ResultsReport verify_results(const std::filesystem::path& file);

// Joins files; a cell that several hold must be equal in all. Throws Error for an incomplete input, and for
// cells of different selections: their means are of different things.
void merge_results(const std::vector<std::filesystem::path>& inputs, const std::filesystem::path& output,
                   bool force);

}  // namespace kvlapse
