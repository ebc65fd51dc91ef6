#include "replay/self_replay.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>

#include "core/base/error.h"
#include "replay/trace_rows.h"

namespace kvlapse {
namespace {

using Victim = std::tuple<int, int, int>;  // step, kv head, position

// Replays `policy` over `rows` and compares each layer with the evictions recorded in `recorded`.
SelfReplayReport compare(const TraceReader& recorded, const RowSource& rows, ReplayOptions options) {
  const TraceHeader& header = recorded.header();
  SelfReplayReport report;
  report.policy = header.policy.spec;
  report.budget_slots = header.budget_slots;
  const std::shared_ptr<const Policy> policy = make_policy(header.policy.spec);
  if (policy->info().version != header.policy.version)
    fail("{}: policy {}: recorded with version {}, this program has version {}", recorded.file().string(),
         header.policy.spec, header.policy.version, policy->info().version);

  const ReplayEngine engine(rows, options);
  for (int s = 0; s < recorded.n_sequences(); ++s) {
    const TraceSequence sequence = recorded.sequence(s);
    const int n_steps = std::min(recorded.n_steps(s), rows.sequence(s).n_tokens);
    std::map<int, std::vector<Victim>> replayed;  // by layer
    for (int layer = engine.layer_begin(); layer < engine.layer_end(); ++layer) replayed[layer];
    std::mutex mutex;
    engine.decide(s, {{policy, sequence.budget_slots}}, [&](size_t, int layer, const EvictionPlan& plan) {
      std::vector<Victim>& victims = replayed.at(layer);
      if (raw(plan.step) >= n_steps) return;
      for (const Drop& drop : plan.drops) victims.emplace_back(raw(plan.step), drop.kv_head, raw(drop.pos));
      const std::lock_guard lock(mutex);
      report.ties += plan.near_ties;
    });
    for (auto& [layer, ours] : replayed) {
      std::vector<Victim> theirs;
      for (const TraceEviction& e : recorded.evictions(s, layer, 0, n_steps))
        theirs.emplace_back(e.step, e.kv_head, e.pos);
      report.decisions += static_cast<int64_t>(theirs.size());
      std::sort(ours.begin(), ours.end());
      std::sort(theirs.begin(), theirs.end());
      std::vector<Victim> only_ours, only_theirs;
      std::set_difference(ours.begin(), ours.end(), theirs.begin(), theirs.end(),
                          std::back_inserter(only_ours));
      std::set_difference(theirs.begin(), theirs.end(), ours.begin(), ours.end(),
                          std::back_inserter(only_theirs));
      report.mismatches += static_cast<int64_t>(std::max(only_ours.size(), only_theirs.size()));
      if (report.first_mismatch || (only_ours.empty() && only_theirs.empty())) continue;
      const Victim first = only_theirs.empty() ? only_ours[0]
                           : only_ours.empty() ? only_theirs[0]
                                               : std::min(only_ours[0], only_theirs[0]);
      Mismatch mismatch{s, layer, std::get<0>(first), std::get<1>(first), -1, -1};
      auto same_place = [&](const std::vector<Victim>& side) {
        return !side.empty() && std::get<0>(side[0]) == mismatch.step &&
               std::get<1>(side[0]) == mismatch.kv_head;
      };
      if (same_place(only_theirs)) mismatch.recorded_pos = std::get<2>(only_theirs[0]);
      if (same_place(only_ours)) mismatch.replayed_pos = std::get<2>(only_ours[0]);
      report.first_mismatch = mismatch;
    }
  }
  return report;
}

}  // namespace

SelfReplayReport self_replay(const TraceReader& trace, const ReplayOptions& options) {
  return compare(trace, TraceRows(trace), options);
}

SelfReplayReport layer0_replay(const TraceReader& full, const TraceReader& closed,
                               const ReplayOptions& options) {
  for (int s = 0; s < closed.n_sequences(); ++s) {
    if (s >= full.n_sequences())
      fail("{}: sequence {}: expected {} sequences as in {}, found {}", closed.file().string(), s,
           full.n_sequences(), full.file().string(), closed.n_sequences());
    const std::vector<int32_t> ours = full.sequence(s).tokens, theirs = closed.sequence(s).tokens;
    if (full.n_steps(s) < closed.n_steps(s) ||
        !std::equal(theirs.begin(), theirs.begin() + closed.n_steps(s), ours.begin()))
      fail("{}: sequence {}: expected the tokens of {}, found others", closed.file().string(), s,
           full.file().string());
  }
  ReplayOptions layer0 = options;
  layer0.layer_begin = 0;
  layer0.layer_end = 1;
  return compare(closed, TraceRows(full), layer0);
}

}  // namespace kvlapse
