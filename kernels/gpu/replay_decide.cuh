// Decisions: one configuration and score row a block or cluster, step after step.
#pragma once

#include "kernels/gpu/replay_common.cuh"

namespace kvlapse::gpu_replay {

// A lowest score (none is negative: its bits plus one), its slot (as a number that is lower for those that go
// first) and the next lowest score.
struct Candidate {
  static constexpr uint32_t kNone = ~uint32_t{0};
  uint32_t low = kNone, slot = kNone, next = kNone, unused = 0;
  // Slots come in order; `last_tie` is one where the last of equal ones goes first.
  KVLAPSE_DEVICE void add(uint32_t key, uint32_t of, uint32_t last_tie) {
    const uint32_t behind = key > low ? key : low;
    if (key - last_tie < low) slot = of;
    low = key < low ? key : low;
    next = behind < next ? behind : next;
  }
  KVLAPSE_DEVICE void merge(const Candidate& o) {
    const bool other = o.low < low || (o.low == low && o.slot < slot);
    const uint32_t behind = other ? low : o.low, own = other ? o.next : next;
    next = behind < own ? behind : own;
    if (other) low = o.low, slot = o.slot;
  }
  KVLAPSE_DEVICE Candidate across_warp() const {
    Candidate all;
    all.low = ~warp_largest(~low);
    all.slot = ~warp_largest(low == all.low ? ~slot : 0u);
    all.next = ~warp_largest(~(low == all.low && slot == all.slot ? next : low));
    return all;
  }
};
static_assert(sizeof(Candidate) == 16);

// A task on `cluster` blocks. Slot s belongs to the block that has its lane s % 16, so that each block sums
// whole lanes; they exchange sums of lanes and candidates. Bytes complete whatever phase of a barrier is
// under way, so none may be sent for the next phase before every block has ended this one. Candidates follow
// from sums that a block sends once it has the candidates before them; sums take two buffers and barriers by
// turns, because a block may send those of the next step, if nothing is evicted, once it has heard all of
// this one's. Exponentials are the recording's (vector_math.h says why they serve every configuration). A
// thread scores the same slots at every step, and asks for their next weights once it has.
template <int kLanes, bool kLarge>
class Decide {
 public:
  KVLAPSE_DEVICE Decide(const DecideArgs& args, int block, unsigned char* memory)
      : a_(args),
        index_(block / args.cluster),
        task_(args.tasks[index_]),
        shape_(args.shape),
        rank_(block % args.cluster),
        thread_(thread_index()),
        n_heads_(task_.n_heads),
        group_(args.shape.group()),
        width_(n_heads_ * kLanes),
        slot_floats_(slot_floats(n_heads_, kLanes)),
        own_lanes_(kSumLanes / args.cluster) {
    const DecideLayout layout =
        decide_layout(task_.score, n_heads_, kLanes, task_.capacity, args.cluster, kLarge);
    slots_ = layout.slots;
    own_shift_ = args.cluster == 1 ? 4 : args.cluster == 2 ? 3 : args.cluster == 4 ? 2 : 1;
    barriers_ = device::smem_address(memory);
    warp_candidates_ = reinterpret_cast<Candidate*>(memory + 64);
    block_candidates_ = warp_candidates_ + 64;
    lane_sums_ = reinterpret_cast<float*>(block_candidates_ + kMaxCluster);
    inverse_ = lane_sums_ + 2 * kSumLanes * width_;
    newest_ = inverse_ + width_;
    newest_norms_ = newest_ + width_;
    positions_ = reinterpret_cast<int32_t*>(memory + layout.positions);
    sums_ = reinterpret_cast<float*>(memory + layout.sums);
    norms_ = reinterpret_cast<float*>(memory + layout.norms);
    if constexpr (kLarge)
      weights_ = task_.scratch + static_cast<int64_t>(rank_) * slots_ * slot_floats_;
    else
      weights_ = reinterpret_cast<float*>(memory + layout.weights);
  }

  KVLAPSE_DEVICE void run() {
    const int begin = most(a_.t0, task_.begin);
    if (begin >= a_.t1) return;
    int count = task_.count, hole = task_.hole;
    int64_t near_ties = task_.near_ties;
    const bool has_attention = attends(task_.score), keeps_sums = accumulates(task_.score),
               has_norms = reads_l1(task_.score);
    if (thread_ == 0) {
      device::mbarrier_init(barriers_, static_cast<uint32_t>(a_.n_threads));
      for (int i = 1; i <= kCandidates; ++i)
        device::mbarrier_init(barriers_ + static_cast<uint32_t>(8 * i), 1);
      device::fence_barrier_init();
    }
    load(count, keeps_sums, has_norms);
    float next_norm = 0;
    if (has_norms && thread_ < n_heads_) next_norm = norm_of(thread_, begin);
    bool failed = false, asked = false;
    if (a_.cluster > 1) {
      device::cluster_arrive();
      device::cluster_wait();
    } else {
      block_sync();
    }
    for (int step = begin; step < a_.t1; ++step) {
      const int slot = hole >= 0 ? hole : count++;
      hole = -1;
      newest_own_ = slot % kSumLanes >> own_shift_ == rank_ ? local(slot) : -1;
      const int n = own_count(count);
      const bool due = step >= a_.n_prompt && count > task_.trigger;
      if (has_norms && thread_ < n_heads_) {
        newest_norms_[(step & 1) * n_heads_ + thread_] = next_norm;
        if (step + 1 < shape_.n_tokens) next_norm = norm_of(thread_, step + 1);
      }
      if (has_attention && (due || keeps_sums)) {
        if (!asked) ask(step, n);
        attend(step, n);
        asked = !kLarge && step + 1 < a_.t1;
      } else if (has_norms) {
        block_sync();
      }
      append(step, keeps_sums, has_norms);
      if (!due && !keeps_sums) continue;
      const Candidate found = score(step, n, due, asked);
      if (!due) continue;
      if (found.low == Candidate::kNone || found.low == 0) {
        failed = true;
        if (thread_ == 0) a_.tasks[index_].failed = step;
        break;
      }
      hole = static_cast<int>(task_.last_tie != 0 ? ~found.slot : found.slot);
      if (thread_ == 0) near_ties += near_tie(found);
      if (hole % kSumLanes >> own_shift_ == rank_) {
        const int j = local(hole);
        if (is_own(j)) {
          const int pos = positions_[j];
          for (int h = 0; h < n_heads_; ++h)
            task_.last[static_cast<int64_t>(task_.head + h) * shape_.n_tokens + pos] = step;
        }
      }
    }
    if (failed && asked) await_weights();
    if (a_.cluster > 1) {  // nobody leaves while others write to it
      device::cluster_arrive();
      device::cluster_wait();
    } else {
      block_sync();
    }
    if (failed) return;
    for (int j = thread_; j < own_count(count); j += a_.n_threads) {
      task_.positions[slot_of(j)] = positions_[j];
      if (!keeps_sums) continue;
      for (int h = 0; h < n_heads_; ++h)
        task_.sums[static_cast<int64_t>(h) * task_.capacity + slot_of(j)] = sums_[h * slots_ + j];
    }
    if (rank_ != 0 || thread_ != 0) return;
    DecideTask& to = a_.tasks[index_];
    to.count = count, to.hole = hole, to.near_ties = near_ties;
  }

 private:
  // Barriers: weights have landed (0); what the blocks of a cluster tell.
  enum Told { kSums = 1, kOtherSums, kCandidates };

  // Whether this thread scores the slot.
  KVLAPSE_DEVICE bool is_own(int j) const { return j % a_.n_threads == thread_; }
  KVLAPSE_DEVICE int local(int slot) const {
    return (slot / kSumLanes << own_shift_) + (slot % kSumLanes & (own_lanes_ - 1));
  }
  KVLAPSE_DEVICE int slot_of(int j) const {
    return (j >> own_shift_) * kSumLanes + (rank_ << own_shift_) + (j & (own_lanes_ - 1));
  }
  KVLAPSE_DEVICE int own_count(int count) const {
    const int rest = count % kSumLanes - (rank_ << own_shift_);
    return (count / kSumLanes << own_shift_) + most(0, least(rest, own_lanes_));
  }
  KVLAPSE_DEVICE float norm_of(int head, int pos) const {
    return task_.value_l1[static_cast<int64_t>(task_.head + head) * shape_.n_tokens + pos];
  }

  KVLAPSE_DEVICE void load(int count, bool keeps_sums, bool has_norms) {
    for (int j = thread_; j < own_count(count); j += a_.n_threads) {
      const int slot = slot_of(j), pos = task_.positions[slot];
      positions_[j] = pos;
      for (int h = 0; h < n_heads_; ++h) {
        if (keeps_sums) sums_[h * slots_ + j] = task_.sums[static_cast<int64_t>(h) * task_.capacity + slot];
        if (has_norms) norms_[h * slots_ + j] = norm_of(h, pos);
      }
    }
  }
  // By the thread that scores the slot.
  KVLAPSE_DEVICE void append(int step, bool keeps_sums, bool has_norms) {
    const int j = newest_own_;
    if (j < 0 || !is_own(j)) return;
    positions_[j] = step;
    for (int h = 0; h < n_heads_; ++h) {
      if (keeps_sums) sums_[h * slots_ + j] = 0;
      if (has_norms) norms_[h * slots_ + j] = newest_norms_[(step & 1) * n_heads_ + h];
    }
  }

  // ---- weights of a step ----
  KVLAPSE_DEVICE const float* row_of(int step, int h) const {
    return a_.weights + shape_.row(step - a_.t0, task_.head + h);
  }
  // A step's weights of one kv head and position, as bytes behind those of the task's first.
  KVLAPSE_DEVICE static void ask_head(const char* row, uint32_t offset, SmemAddress to) {
    KVLAPSE_UNROLL
    for (int i = 0; i < kLanes / 4; ++i)
      device::copy_async16(to + static_cast<uint32_t>(16 * i), row + offset + 16 * i, true);
  }
  KVLAPSE_DEVICE uint32_t head_bytes() const { return static_cast<uint32_t>(shape_.stride) * kLanes * 4; }
  // Brings the row behind that of `step` nearer, where the slots are many enough to need most of it.
  KVLAPSE_DEVICE void prefetch_row(int step, int n) const {
    constexpr int kLine = 32;
    const int lines = (step + 1) * kLanes / kLine;
    if (step + 1 >= a_.t1 || n * a_.cluster < lines) return;
    for (int h = rank_; h < n_heads_; h += a_.cluster) {
      const float* row = row_of(step + 1, h);
      for (int i = thread_; i < lines; i += a_.n_threads) device::prefetch_l2(row + i * kLine);
    }
  }
  // The token of `step` itself, whose slot is not known yet, and the end of what this thread asks for.
  KVLAPSE_DEVICE void ask_newest(int step) const {
    for (int i = thread_; i < width_ / 4; i += a_.n_threads) {
      const int h = 4 * i / kLanes;
      device::copy_async16(device::smem_address(newest_ + 4 * i),
                           row_of(step, h) + static_cast<int64_t>(step) * kLanes + 4 * i % kLanes, true);
    }
    device::copy_async_arrive(barriers_);
  }
  KVLAPSE_DEVICE void ask(int step, int n) const {
    if constexpr (!kLarge) {
      const char* row = reinterpret_cast<const char*>(row_of(step, 0));
      for (int j = thread_; j < n; j += a_.n_threads) {
        if (j == newest_own_) continue;
        uint32_t offset = static_cast<uint32_t>(positions_[j]) * kLanes * 4;
        SmemAddress to = device::smem_address(weights_ + j * slot_floats_);
        for (int h = 0; h < n_heads_; ++h, offset += head_bytes(), to += kLanes * 4)
          ask_head(row, offset, to);
      }
    }
    ask_newest(step);
  }
  KVLAPSE_DEVICE void await_weights() {
    device::mbarrier_wait(barriers_, landed_ & 1);
    ++landed_;
  }

  KVLAPSE_DEVICE void tell(Float4* to, const Float4& v, int rank, int told) const {
    device::remote_store4(device::remote_address(device::smem_address(to), rank), v,
                          device::remote_address(barriers_ + static_cast<uint32_t>(8 * told), rank));
  }
  // Expects `floats` from all blocks together.
  KVLAPSE_DEVICE void expect(int told, int floats) const {
    if (thread_ == 0)
      device::mbarrier_arrive_expect(barriers_ + static_cast<uint32_t>(8 * told),
                                     static_cast<uint32_t>(floats * 4));
  }
  // What was told lies in this block's own shared memory: nothing else need become visible.
  KVLAPSE_DEVICE void hear(int told, uint32_t times) const {
    device::mbarrier_wait(barriers_ + static_cast<uint32_t>(8 * told), times & 1);
  }

  // Exponentials of the own slots and, in inverse_, one over their sum over all slots, for every query head.
  KVLAPSE_DEVICE void attend(int step, int n) {
    await_weights();
    if constexpr (kLarge) gather(step, n);
    if (newest_own_ >= 0)
      for (int i = thread_; i < width_; i += a_.n_threads)
        weights_[newest_own_ * slot_floats_ + i] = newest_[i];
    block_sync();
    if (a_.cluster == 1)
      sum_alone(n);
    else
      sum_together(n);
    block_sync();
  }
  // Into device memory what shared memory cannot hold.
  KVLAPSE_DEVICE void gather(int step, int n) {
    const int h = thread_ % n_heads_, teams = a_.n_threads / n_heads_, team = thread_ / n_heads_;
    if (team >= teams) return;
    const float* row = row_of(step, h);
    const int64_t next = step + 1 < a_.t1 ? static_cast<int64_t>(shape_.n_kv) * shape_.stride * kLanes : 0;
    KVLAPSE_UNROLL_2
    for (int j = team; j < n; j += teams) {
      if (j == newest_own_) continue;
      const float* from = row + static_cast<int64_t>(positions_[j]) * kLanes;
      Weights<kLanes>::load(from).store(weights_ + j * slot_floats_ + h * kLanes);
      device::prefetch_l2(from + next);
    }
  }
  // Sums every `apart`-th own slot from `first` on, in order; eight are on their way while eight are added.
  // kStride: floats between them, 0: any.
  template <int kStride>
  KVLAPSE_DEVICE float chain(const float* from, int first, int apart, int n) const {
    constexpr int kAhead = 8;
    const int stride = kStride > 0 ? kStride : apart * slot_floats_;
    int left = (n - first + apart - 1) / apart;
    from += first * slot_floats_;
    float sum = 0;
    float one[kAhead], two[kAhead];
    const auto load = [&](float(&to)[kAhead]) {
      KVLAPSE_UNROLL
      for (int i = 0; i < kAhead; ++i) to[i] = from[i * stride];
      from += kAhead * stride;
    };
    const auto add = [&](const float(&values)[kAhead]) {
      KVLAPSE_UNROLL
      for (int i = 0; i < kAhead; ++i) sum += values[i];
    };
    if (left >= kAhead) {
      load(one);
      left -= kAhead;
      KVLAPSE_NO_UNROLL
      for (; left >= 2 * kAhead; left -= 2 * kAhead) {
        load(two);
        add(one);
        load(one);
        add(two);
      }
      add(one);
    }
    KVLAPSE_NO_UNROLL
    for (; left > 0; --left, from += stride) sum += *from;
    return sum;
  }
  // One over a sum. NaN, which ends the run, where held tokens have too little of the weight for the
  // recording's exponentials; zero for columns behind the group, so that nobody needs to skip them.
  KVLAPSE_DEVICE float inverse_of(float sum, int column) const {
    if (column % kLanes >= group_) return 0;
    return sum >= kLeastSharedSum ? 1.0f / sum : device::bits_float(0x7fc00000u);
  }

  // A thread sums one lane of a query head; sixteen neighbours hold the lanes and add them as vector_math.h
  // does: l + 8, then + 4, + 2, + 1.
  KVLAPSE_DEVICE void sum_alone(int n) {
    for (int i = thread_; i < kSumLanes * width_; i += a_.n_threads) {
      const int lane = i % kSumLanes, column = i / kSumLanes;
      float sum = n_heads_ == 1 ? chain<kSumLanes * kLanes>(weights_ + column, lane, kSumLanes, n)
                                : chain<0>(weights_ + column, lane, kSumLanes, n);
      KVLAPSE_UNROLL
      for (int mask = kSumLanes / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
      if (lane == 0) inverse_[column] = inverse_of(sum, column);
    }
  }
  // Another block may be a step ahead, not two: it needs this one's sums.
  KVLAPSE_DEVICE void sum_together(int n) {
    float* sums = lane_sums_ + (heard_ & 1) * kSumLanes * width_;
    const int told = (heard_ & 1) != 0 ? kOtherSums : kSums;
    expect(told, kSumLanes * width_);
    const int chains = own_lanes_ * width_;
    for (int i = thread_; i < (chains + 31) / 32 * 32; i += a_.n_threads) {
      const int own = least(i, chains - 1) / width_, column = least(i, chains - 1) % width_,
                lane = (rank_ << own_shift_) + own;
      const float sum = chain<0>(weights_ + column, own, own_lanes_, n);
      const int first = thread_ % 32 / 4 * 4;
      const Float4 quad = {shuffle_from(sum, first), shuffle_from(sum, first + 1),
                           shuffle_from(sum, first + 2), shuffle_from(sum, first + 3)};
      for (int r = thread_ % 4; i < chains && r < a_.cluster; r += 4)
        tell(reinterpret_cast<Float4*>(sums + lane * width_ + column / 4 * 4), quad, r, told);
    }
    hear(told, heard_++ / 2);
    for (int i = thread_; i < width_; i += a_.n_threads) {
      float lanes[kSumLanes];
      KVLAPSE_UNROLL
      for (int l = 0; l < kSumLanes; ++l) lanes[l] = sums[l * width_ + i];
      KVLAPSE_UNROLL
      for (int w = kSumLanes / 2; w > 0; w /= 2) {
        KVLAPSE_UNROLL
        for (int l = 0; l < w; ++l) lanes[l] += lanes[l + w];
      }
      inverse_[i] = inverse_of(lanes[0], i);
    }
  }

  // `asks`: for the weights of the next step.
  KVLAPSE_DEVICE Candidate score(int step, int n, bool due, bool asks) {
    if (asks) prefetch_row(step + 1, n);
    const bool by_max = task_.gqa == Reduce::max;
    Candidate own;
    switch (task_.score) {
      case DeviceScore::random: own = score_slots<Kind::random, false>(step, n, due, asks); break;
      case DeviceScore::contribution: own = score_with<Kind::contribution>(step, n, due, asks); break;
      case DeviceScore::accumulated:
        own = by_max ? score_with<Kind::summed_peaks>(step, n, due, asks)
                     : score_with<Kind::summed>(step, n, due, asks);
        break;
      case DeviceScore::accumulated_contribution:
        own = by_max ? score_with<Kind::summed_peaks_by_norm>(step, n, due, asks)
                     : score_with<Kind::summed_by_norm>(step, n, due, asks);
        break;
      default:
        own = by_max && task_.score != DeviceScore::attention_mean
                  ? score_with<Kind::peak>(step, n, due, asks)
                  : score_with<Kind::weight>(step, n, due, asks);
    }
    if (asks) ask_newest(step + 1);
    if (!due) return own;
    own = own.across_warp();
    Candidate* const told = warp_candidates_ + (step & 1) * 32;
    if (thread_ % 32 == 0) told[thread_ / 32] = own;
    block_sync();
    if (a_.cluster == 1 || thread_ < 32) {
      Candidate all;
      if (thread_ % 32 < a_.n_threads / 32) all = told[thread_ % 32];
      own = all.across_warp();
    }
    if (a_.cluster == 1) return own;
    expect(kCandidates, a_.cluster * 4);
    if (thread_ < a_.cluster)
      tell(reinterpret_cast<Float4*>(block_candidates_ + rank_),
           Float4{device::bits_float(own.low), device::bits_float(own.slot), device::bits_float(own.next), 0},
           thread_, kCandidates);
    hear(kCandidates, decided_++);
    own = block_candidates_[0];
    for (int r = 1; r < a_.cluster; ++r) own.merge(block_candidates_[r]);
    return own;
  }

  // What a slot's weights become, as policies of core/policy define it: summed kinds are sums over steps of
  // all query heads or of the largest.
  enum class Kind {
    random,
    weight,
    peak,
    contribution,
    summed,
    summed_peaks,
    summed_by_norm,
    summed_peaks_by_norm
  };
  template <Kind kKind>
  KVLAPSE_DEVICE Candidate score_with(int step, int n, bool due, bool asks) {
    return n_heads_ == 1 ? score_slots<kKind, true>(step, n, due, asks)
                         : score_slots<kKind, false>(step, n, due, asks);
  }
  static constexpr bool by_norm(Kind k) {
    return k == Kind::summed_by_norm || k == Kind::summed_peaks_by_norm;
  }
  static constexpr bool peaks(Kind k) { return k == Kind::summed_peaks || k == Kind::summed_peaks_by_norm; }
  static constexpr bool summed(Kind k) { return peaks(k) || by_norm(k) || k == Kind::summed; }

  // What a score needs of one (slot, kv head).
  struct Operands {
    Weights<kLanes> w;
    float norm, sum;
  };
  template <Kind kKind>
  KVLAPSE_DEVICE Operands operands(int j, int h) const {
    return {Weights<kLanes>::load(weights_ + j * slot_floats_ + h * kLanes),
            by_norm(kKind) || kKind == Kind::contribution ? norms_[h * slots_ + j] : 0.0f,
            summed(kKind) ? sums_[h * slots_ + j] : 0.0f};
  }
  // The score with one more kv head; the slot's new sum in `x.sum`.
  template <Kind kKind>
  KVLAPSE_DEVICE float add_head(Operands& x, const Weights<kLanes>& inverse, float share, float score) const {
    float peak = 0;
    KVLAPSE_UNROLL
    for (int g = 0; g < kLanes; ++g) {
      const float p = x.w.v[g] * inverse.v[g];
      if constexpr (peaks(kKind))
        peak = p > peak ? p : peak;
      else if constexpr (summed(kKind))
        x.sum = fmaf(share, p, x.sum);
      else if constexpr (kKind == Kind::contribution)
        score = fmaf(p, x.norm, score);
      else if constexpr (kKind == Kind::peak)
        score = p > score ? p : score;
      else
        score += p;
    }
    if constexpr (peaks(kKind))
      x.sum = group_ > 1 ? x.sum + peak : fmaf(share, x.w.v[0] * inverse.v[0], x.sum);
    if constexpr (by_norm(kKind))
      score = fmaf(x.sum, x.norm, score);
    else if constexpr (peaks(kKind))
      score = x.sum > score ? x.sum : score;
    else if constexpr (summed(kKind))
      score += x.sum;
    return score;
  }

  // Two slots or two heads are loaded before either asks for its next weights: what asks cannot be moved
  // past loads.
  template <Kind kKind, bool kOneHead>
  KVLAPSE_DEVICE Candidate score_slots(int step, int n, bool due, bool asks) {
    constexpr int kAtOnce = kKind == Kind::random ? 1 : 2, kSlots = kOneHead ? kAtOnce : 1,
                  kHeads = kOneHead ? 1 : kAtOnce;
    constexpr bool kScales = kKind == Kind::contribution || kKind == Kind::weight || kKind == Kind::summed;
    const uint32_t first_free = static_cast<uint32_t>(task_.first_free),
                   n_free =
                       due ? static_cast<uint32_t>(most(0, step - task_.recent + 1 - task_.first_free)) : 0,
                   last_tie = task_.last_tie != 0 ? 1u : 0u;
    const uint64_t draw = kKind == Kind::random ? mix64(task_.seed ^ static_cast<uint64_t>(step)) : 0;
    const float share = task_.gqa == Reduce::mean ? 1.0f / static_cast<float>(group_) : 1.0f;
    const float scale = scale_of<kKind>();
    const char* next = reinterpret_cast<const char*>(asks ? row_of(step + 1, 0) : a_.weights);
    const uint32_t head_bytes = this->head_bytes();
    const int n_heads = kOneHead || kKind == Kind::random ? 1 : n_heads_;
    Candidate own;
    uint32_t any_nan = 0;
    KVLAPSE_NO_UNROLL
    for (int j = thread_; j < n; j += kSlots * a_.n_threads) {
      int pos[kSlots];
      float score[kSlots];
      KVLAPSE_UNROLL
      for (int k = 0; k < kSlots; ++k) {
        const int at = j + k * a_.n_threads;
        pos[k] = positions_[at < n ? at : j];
        score[k] = kKind == Kind::peak || peaks(kKind) ? -infinity() : 0.0f;
      }
      KVLAPSE_NO_UNROLL
      for (int h = 0; h < n_heads; h += kHeads) {
        if constexpr (kKind == Kind::random) {
          score[0] = unit_float(mix64(draw ^ static_cast<uint64_t>(pos[0])));
        } else {
          Operands x[kAtOnce];
          Weights<kLanes> inverse[kHeads];
          KVLAPSE_UNROLL
          for (int k = 0; k < kHeads; ++k)
            inverse[k] = Weights<kLanes>::load(inverse_ + (h + k < n_heads ? h + k : h) * kLanes);
          KVLAPSE_UNROLL
          for (int k = 0; k < kAtOnce; ++k) {
            const int at = j + (kOneHead ? k * a_.n_threads : 0), of = h + (kOneHead ? 0 : k);
            x[k] = operands<kKind>(at < n ? at : j, of < n_heads ? of : h);
          }
          KVLAPSE_UNROLL
          for (int k = 0; k < kAtOnce; ++k) {
            const int at = j + (kOneHead ? k * a_.n_threads : 0), of = h + (kOneHead ? 0 : k);
            if (!kLarge && asks && at < n && of < n_heads)
              ask_head(next,
                       static_cast<uint32_t>(pos[kOneHead ? k : 0]) * kLanes * 4 +
                           static_cast<uint32_t>(of) * head_bytes,
                       device::smem_address(weights_ + at * slot_floats_ + of * kLanes));
          }
          KVLAPSE_UNROLL
          for (int k = 0; k < kAtOnce; ++k) {
            const int at = j + (kOneHead ? k * a_.n_threads : 0), of = h + (kOneHead ? 0 : k);
            if (at >= n || of >= n_heads) continue;
            float& to = score[kOneHead ? k : 0];
            to = add_head<kKind>(x[k], inverse[kOneHead ? 0 : k], share, to);
            if constexpr (summed(kKind)) sums_[of * slots_ + at] = x[k].sum;
          }
        }
      }
      KVLAPSE_UNROLL
      for (int k = 0; k < kSlots; ++k) {
        const int at = j + k * a_.n_threads;
        if (at >= n) continue;
        const float of_slot = kScales ? score[k] * scale : score[k];
        const bool counts = static_cast<uint32_t>(pos[k]) - first_free < n_free;
        if (counts && of_slot != of_slot) any_nan = 1;
        own.add(counts ? device::float_bits(of_slot) + 1 : Candidate::kNone, static_cast<uint32_t>(at),
                last_tie);
      }
    }
    const int slot = slot_of(static_cast<int>(own.slot));
    own.slot = static_cast<uint32_t>(last_tie != 0 ? ~slot : slot);
    if (own.low == Candidate::kNone) own.slot = Candidate::kNone;
    if (any_nan != 0) own.low = own.slot = 0;  // below every number
    return own;
  }
  // Of a slot's score.
  template <Kind kKind>
  KVLAPSE_DEVICE float scale_of() const {
    if (kKind == Kind::contribution) return task_.scale;
    const bool mean = task_.gqa == Reduce::mean || task_.score == DeviceScore::attention_mean;
    const int voters = kKind == Kind::summed ? n_heads_ : n_heads_ * group_;
    return mean && voters > 1 ? 1.0f / static_cast<float>(voters) : 1.0f;
  }

  KVLAPSE_DEVICE static bool near_tie(const Candidate& found) {
    if (found.next == Candidate::kNone) return false;
    const float low = device::bits_float(found.low - 1), next = device::bits_float(found.next - 1);
    if (next - low > 4e-6f * fmaxf(fabsf(low), fabsf(next))) return false;  // by far
    const double a = low, b = next;
    const double size = (a < 0 ? -a : a) > (b < 0 ? -b : b) ? (a < 0 ? -a : a) : (b < 0 ? -b : b);
    return (a < b ? b - a : a - b) <= 1e-6 * size;
  }

  const DecideArgs& a_;
  const int index_;
  const DecideTask task_;
  const Shape shape_;
  const int rank_, thread_, n_heads_, group_, width_, slot_floats_, own_lanes_;
  int own_shift_, slots_;
  int newest_own_ = -1;  // own number of the slot that this step fills, -1: another's
  uint32_t landed_ = 0, heard_ = 0, decided_ = 0;  // times that weights, sums and candidates came
  SmemAddress barriers_;
  Candidate *warp_candidates_, *block_candidates_;
  float *lane_sums_, *inverse_, *newest_, *newest_norms_, *sums_, *norms_, *weights_;
  int32_t* positions_;
};

}  // namespace kvlapse::gpu_replay
