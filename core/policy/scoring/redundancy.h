// How much a key says that others say too: R-KV's redundancy and its relatives. For the files of
// core/policy/policies.
#pragma once

#include <cstdint>
#include <span>

#include "core/policy/layer_inputs.h"

namespace kvlapse {

// A key divided by its norm as R-KV does it: what its cosines are products of.
void unit_key(std::span<const float> key, float* out);

// R-KV (Zefan-Cai/R-KV, cal_similarity with "last"): softmax over all slots of the mean over rows of the
// keys' cosines, the diagonal and one entry a row forgiven: the last one above `threshold`, or slot 0.
void forgiving_redundancy(LayerInputs& inputs, int kv_head, int head_dim, float threshold,
                          std::span<float> out);

// Its end, for who compares keys elsewhere. `out` holds each unit key's product with the mean of all; own:
// with itself; row i forgives slot similar[i] its cosine[i].
void forgive(std::span<const float> own, std::span<const int32_t> similar, std::span<const float> cosine,
             std::span<float> out);

// The LongFlow repository's port: keys divided by their squared norm, nothing forgiven.
void plain_redundancy(std::span<const float> keys, int head_dim, std::span<float> out);

}  // namespace kvlapse
