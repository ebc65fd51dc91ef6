#include "replay/synthetic_rows.h"

#include <cmath>

#include "core/base/rng.h"

namespace kvlapse {
namespace {

float normal(uint64_t key) {  // sum of four uniforms, near enough
  float total = 0;
  for (uint64_t i = 0; i < 4; ++i) total += unit_float(mix64(key * 4 + i)) - 0.5f;
  return total * 1.732f;
}

float round_to(float value, DType type) {
  return type == DType::bf16  ? bf16_to_f32(f32_to_bf16(value))
         : type == DType::f16 ? f16_to_f32(f32_to_f16(value))
                              : value;
}

}  // namespace

MemoryRows synthetic_rows(CacheGeometry g, int n_tokens, int n_prompt, uint64_t seed, int n_sequences) {
  std::vector<RowSequence> sequences(n_sequences, RowSequence{n_tokens, n_prompt, n_prompt, -1});
  MemoryRows rows(g, sequences);
  for (int s = 0; s < n_sequences; ++s)
    for (int layer = 0; layer < g.n_layers; ++layer)
      for (int t = 0; t < n_tokens; ++t)
        for (int h = 0; h < g.n_kv_heads; ++h) {
          const uint64_t at = counter_random({seed, uint64_t(s), uint64_t(layer), uint64_t(t), uint64_t(h)});
          const uint64_t topic = counter_random({seed, uint64_t(layer), uint64_t(h), at % 12});
          float* k = rows.row(s, layer, RowKind::k, t) + h * g.head_dim;
          float* v = rows.row(s, layer, RowKind::v, t) + h * g.head_dim;
          for (int d = 0; d < g.head_dim; ++d) {
            k[d] = round_to(normal(topic + d) + 0.7f * normal(at ^ (0x100 + d)) + (t == 0 ? 1.0f : 0.0f),
                            g.dtype);
            v[d] = round_to(normal(at ^ (0x900 + d)) * (0.5f + unit_float(mix64(at))), g.dtype);
          }
          for (int j = 0; j < g.group(); ++j) {
            const uint64_t mine = mix64(at + j + 1);
            // A token far back or a recent one, and always some pull of the first.
            const int target =
                mine % 3 == 0 ? static_cast<int>(mine / 3 % (t + 1)) : std::max(0, t - int(mine / 3 % 40));
            const float* near = rows.row(s, layer, RowKind::k, target) + h * g.head_dim;
            float* q = rows.row(s, layer, RowKind::q, t) + (h * g.group() + j) * g.head_dim;
            for (int d = 0; d < g.head_dim; ++d)
              q[d] = round_to(0.6f * near[d] + 0.5f + 0.6f * normal(mine ^ (0x300 + d)), g.dtype);
          }
        }
  return rows;
}

}  // namespace kvlapse
