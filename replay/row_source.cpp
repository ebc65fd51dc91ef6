#include "replay/row_source.h"

#include <algorithm>

namespace kvlapse {

MemoryRows::MemoryRows(CacheGeometry geometry, std::vector<RowSequence> sequences)
    : geometry_(geometry), sequences_(std::move(sequences)) {
  data_.resize(sequences_.size() * geometry_.n_layers * 3);
  for (int s = 0; s < n_sequences(); ++s)
    for (int layer = 0; layer < geometry_.n_layers; ++layer)
      for (RowKind kind : {RowKind::q, RowKind::k, RowKind::v})
        data_[index(s, layer, kind)].resize(static_cast<size_t>(sequences_[s].n_tokens) * width(kind));
}

float* MemoryRows::row(int sequence, int layer, RowKind kind, int pos) {
  return data_[index(sequence, layer, kind)].data() + static_cast<size_t>(pos) * width(kind);
}

void MemoryRows::rows(int sequence, int layer, RowKind kind, int first, int n, float* out) const {
  const std::vector<float>& data = data_[index(sequence, layer, kind)];
  std::copy_n(data.data() + static_cast<size_t>(first) * width(kind), static_cast<size_t>(n) * width(kind),
              out);
}

}  // namespace kvlapse
