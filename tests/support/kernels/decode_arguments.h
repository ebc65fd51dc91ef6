// A problem's numbers as kernel arguments; the pointers are the caller's (host or device).
#pragma once

#include <cmath>

#include "tests/support/kernels/decode_problem.h"

namespace kvlapse {

template <class TensorMap>
void set_decode_scalars(DecodeArgs<TensorMap>& args, const DecodeProblem& p, const DecodePlan& plan) {
  args.n_items = p.shape.n_items();
  args.n_kv_heads = p.shape.n_kv_heads;
  args.group = p.shape.group();
  args.half_group = (p.shape.group() + 1) / 2;
  args.n_slots = p.shape.n_slots;
  args.budget = p.budget;
  args.recent = divisor_of(p.recent);
  args.pinned = p.pinned;
  args.n_splits = plan.n_splits;
  args.by_kv_heads = divisor_of(args.n_kv_heads);
  args.by_splits = divisor_of(args.n_splits);
  args.n_groups = plan.n_groups;
  args.warp_bytes = plan.warp_bytes;
  args.n_stages = plan.n_stages;
  args.by_groups = divisor_of(plan.n_groups);
  args.logits_bytes = plan.logits_bytes;
  args.softmax_rows = plan.softmax_rows;
  args.partial_offset = plan.partial_offset;
  args.owners = plan.owners;
  args.small_offset = plan.small_offset;
  args.next_early = plan.next_early;
  args.state_ahead = plan.state_ahead;
  args.logit_scale = static_cast<float>(M_LOG2E / std::sqrt(static_cast<double>(p.shape.head_dim)));
  args.score_scale = p.score_scale();
  args.score = p.score;
  args.io_bf16 = p.shape.io() == DType::bf16;
  args.shared = p.shared;
  args.early_state = false;
}

}  // namespace kvlapse
