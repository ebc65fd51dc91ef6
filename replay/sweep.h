// Sweep: every policy x budget over every trace, as cells of a results file. Cells have an identity that
// depends on nothing but what they compute, so a sweep can be interrupted, resumed and split over machines.
#pragma once

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "replay/device_replay.h"
#include "replay/occupancy.h"
#include "replay/results_file.h"
#include "trace/trace_reader.h"

namespace kvlapse {

// Raised when the meaning of any stored number changes; part of every cell's id.
inline constexpr int kReplayAlgorithm = 3;

struct SweepOptions {
  ReplayOptions replay;
  int max_tokens = 0;  // of each sequence, the first ones; 0: all
  BudgetMatch match = BudgetMatch::nominal;
  int shard = 0, n_shards = 1;
  // Replays what it serves; null, or for other policies: the CPU.
  ReplayDevice* device = nullptr;
  int cells_at_once = 48;  // of one trace, sharing work; a killed sweep loses at most these
};

struct SweepCell {
  size_t trace = 0;
  std::shared_ptr<const Policy> policy;
  std::string budget;             // as written
  std::vector<int> budget_slots;  // by sequence
  bool fitted_here = false;       // the policy was calibrated on this very recording
  std::string id;
};

class Sweep {
 public:
  // Opens every trace and refuses what cannot run: no q, k, v; a budget below a protected set. Equal cells
  // count once.
  Sweep(const std::vector<std::filesystem::path>& traces, const std::vector<PolicySpec>& policies,
        const std::vector<Budget>& budgets, SweepOptions options);
  ~Sweep();

  // What is replayed, as options; "" for everything. Cells of different selections do not share a file.
  static std::string selection_text(const SweepOptions& options);
  // Whether the cell is computed on the device. Its numbers then agree with the CPU's within a stated
  // precision, not bit for bit: it has an id of its own and says so in its metrics.
  bool on_device(const SweepCell& cell) const {
    return options_.device != nullptr && DeviceReplayer::supports(*cell.policy);
  }
  const std::vector<SweepCell>& cells() const { return cells_; }  // of this shard, in order of trace and id
  const ResultTrace& trace(size_t index) const { return traces_[index].facts; }
  // Computes the cells that `results` lacks and adds them. `progress`: cells done and in total (fractions
  // while layers finish); false interrupts (Interrupted is thrown; what was added stays).
  void run(ResultsFile& results, const std::function<bool(double done, double total)>& progress = {});

 private:
  struct Trace {
    std::unique_ptr<TraceReader> reader;
    ResultTrace facts;
  };
  void add_cells(size_t trace, const std::vector<PolicySpec>& policies, const std::vector<Budget>& budgets);
  void run_cells(const std::vector<const SweepCell*>& cells, ResultsFile& results,
                 const std::function<bool(double)>& progress);

  SweepOptions options_;
  std::vector<Trace> traces_;
  std::vector<SweepCell> cells_;
};

}  // namespace kvlapse
