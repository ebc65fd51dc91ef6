#include "tests/support/kernels/decode_cases.h"

namespace kvlapse {

std::vector<NamedDecodeCase> decode_cases(bool small) {
  std::vector<NamedDecodeCase> cases;
  auto add = [&](std::string name, DecodeCase c, int splits = 0) {
    c.seed = cases.size() + 1;
    c.shape.leave_one_out = c.score == FusedScore::leave_one_out;
    cases.push_back({std::move(name), std::move(c), splits});
  };
  using Data = DecodeCase::Data;
  const DType f16 = DType::f16, bf16 = DType::bf16;

  DecodeCase base;
  base.shape = {2, 8, 2, 64, 200, bf16};
  base.tokens = {500, 700};
  base.recent = 1;
  add("plain", base, 1);
  for (int splits : {2, 4, 8}) add("splits " + std::to_string(splits), base, splits);
  for (int group : {1, 2, 3, 5, 7, 8}) {
    DecodeCase c = base;
    c.shape.n_q_heads = 2 * group;
    c.shape.dtype = group % 2 ? f16 : bf16;
    add("group " + std::to_string(group), c, group % 2 + 1);
  }
  for (int dim : {32, 128, 256}) {
    DecodeCase c = base;
    c.shape.head_dim = dim;
    add("head_dim " + std::to_string(dim), c, 2);
    c.shape.dtype = f16;
    add("head_dim fp16 " + std::to_string(dim), c, 1);
  }
  for (int slots : {1, 15, 16, 17, 63, 64, 65, 129}) {
    DecodeCase c = base;
    c.shape.n_slots = slots;
    c.recent = slots > 1 ? 1 : 0;
    add("slots " + std::to_string(slots), c, slots > 64 ? 2 : 1);
  }
  for (FusedScore score : {FusedScore::none, FusedScore::attention, FusedScore::accumulated,
                           FusedScore::accumulated_contribution, FusedScore::contribution}) {
    DecodeCase c = base;
    c.score = score;
    c.recent = 90;
    c.pinned = 4;
    add("score " + std::to_string(static_cast<int>(score)), c, 1);
    c.shared = true;
    add("score shared " + std::to_string(static_cast<int>(score)), c, 2);
  }
  {
    DecodeCase c = base;
    c.shared = true;
    add("shared one split", c, 1);
    add("shared four splits", c, 4);
  }
  {
    DecodeCase c = base;  // before the budget is reached, and far from full: splits without tiles
    c.tokens = {0, 30};
    add("growing", c, 1);
    add("growing, splits", c, 4);
    c.recent = 8, c.pinned = 3;
    add("growing, protected", c, 2);
    c.tokens = {199, 200};
    add("filling up", c, 2);
    c.tokens = {-1, 300};
    add("skipped sequence", c, 2);
    c.shared = true;
    add("skipped sequence, shared", c, 2);
    c.appends = false, c.shared = false, c.recent = 0, c.pinned = 0;
    c.tokens = {0, 150};
    add("empty cache, nothing appended", c, 2);
  }
  {
    DecodeCase c = base;
    c.ragged = true;
    c.tokens = {90, 180};
    add("ragged heads", c, 2);
    c.shape.n_kv_heads = 4, c.shape.n_q_heads = 8;
    add("ragged heads, one split", c, 1);
  }
  for (double range : {0.01, 30.0, 70.0}) {
    DecodeCase c = base;
    c.logit_range = range;
    add("logit range " + std::to_string(static_cast<int>(range)), c, 2);
    c.shape.dtype = f16;
    add("logit range fp16 " + std::to_string(static_cast<int>(range)), c, 1);
  }
  for (Data data : {Data::equal_rows, Data::zero_values, Data::one_hot}) {
    DecodeCase c = base;
    c.data = data;
    add("data " + std::to_string(static_cast<int>(data)), c, 1);
    c.shared = true;
    add("data shared " + std::to_string(static_cast<int>(data)), c, 2);
  }
  {
    DecodeCase c = base;
    c.budget = 77;
    add("budget below capacity", c, 1);
  }
  if (small) return cases;

  for (int slots : {1024, 3276, 4097}) {
    for (int batch : {1, 3}) {
      DecodeCase c = base;
      c.shape = {batch, 32, 8, 128, slots, batch % 2 ? bf16 : f16};
      c.tokens.assign(batch, slots + 100);
      if (batch > 1) c.tokens[1] = slots / 3;
      c.recent = slots / 2;
      c.pinned = 4;
      add("B " + std::to_string(batch) + " S " + std::to_string(slots), c);
      c.shared = true;
      add("shared B " + std::to_string(batch) + " S " + std::to_string(slots), c);
    }
  }
  DecodeCase c = base;
  c.shape = {1, 16, 2, 128, 32768, bf16};
  c.tokens = {40000};
  add("S 32768 G 8", c);
  c.shape = {2, 4, 1, 64, 16384, f16};
  c.tokens = {40000, 16000};
  add("S 16384 D 64", c);
  c.shape = {150, 32, 8, 128, 256, bf16};
  c.tokens.assign(150, 1000);
  for (int b = 0; b < 150; ++b) c.tokens[b] = b * 7;
  add("B 150 ragged sequences", c);
  c.shared = true;
  add("B 150 ragged sequences, shared", c);
  return cases;
}

std::vector<NamedDecodeCase> leave_one_out_cases(bool small) {
  std::vector<NamedDecodeCase> cases;
  for (NamedDecodeCase c : decode_cases(small)) {
    if (c.name.starts_with("score ")) continue;  // "plain" and "shared" are the same with one score
    c.decode.score = FusedScore::leave_one_out;
    c.decode.shape.leave_one_out = true;
    cases.push_back(std::move(c));
  }
  auto add = [&](std::string name, DecodeCase c, int splits) {
    c.score = FusedScore::leave_one_out;
    c.shape.leave_one_out = true;
    c.seed = cases.size() + 1;
    cases.push_back({std::move(name), std::move(c), splits});
  };
  DecodeCase base;
  base.shape = {2, 8, 2, 64, 200, DType::bf16};
  base.tokens = {500, 700};
  base.recent = 90, base.pinned = 4;
  for (DType dtype : {DType::bf16, DType::f16}) {
    DecodeCase c = base;
    c.shape.dtype = dtype;
    add("protected", c, 1);
    c.shared = true;
    add("protected, shared", c, 2);
    c.recent = 1, c.pinned = 0;
    for (double range : {6.0, 15.0, 200.0}) {  // some heads have a slot that outweighs the others
      c.logit_range = range;
      add("steep " + std::to_string(static_cast<int>(range)), c, 2);
      add("steep, three splits " + std::to_string(static_cast<int>(range)), c, 3);
    }
  }
  {
    DecodeCase c = base;  // |o - v| far below |v|
    c.recent = 1, c.pinned = 0;
    c.data = DecodeCase::Data::near_rows;
    add("nearly equal values", c, 1);
    c.shape.dtype = DType::f16;
    add("nearly equal values fp16", c, 2);
    c.logit_range = 12;
    add("nearly equal values, steep", c, 2);
  }
  {
    DecodeCase c = base;
    c.shape.n_slots = 40, c.tokens = {20, 30}, c.recent = 40, c.pinned = 0;
    add("all protected", c, 1);
    c.shared = true;
    add("all protected, shared", c, 1);
  }
  {
    DecodeCase c = base;  // wide heads: one group of consumers
    c.shape = {1, 8, 1, 256, 150, DType::bf16};
    c.tokens = {400}, c.recent = 1, c.pinned = 0;
    add("head_dim 256, group 8", c, 2);
  }
  return cases;
}

std::vector<NamedDecodeCase> fp8_cases(std::vector<NamedDecodeCase> cases) {
  for (NamedDecodeCase& c : cases) {
    c.name += ", fp8";
    c.decode.shape.activation = c.decode.shape.dtype;
    c.decode.shape.dtype = DType::f8e4m3;
  }
  return cases;
}
std::vector<NamedDecodeCase> fp8_decode_cases(bool small) {
  return fp8_cases(decode_cases(small));
}

}  // namespace kvlapse
