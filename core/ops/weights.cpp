#include "core/ops/weights.h"

namespace kvlapse {

uint64_t TransformerWeights::bytes() const {
  uint64_t total = embedding.bytes() + (head.data == embedding.data ? 0 : head.bytes());
  for (const LayerWeights& l : layers)
    for (const Matrix* m : {&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down}) total += m->bytes();
  return total;
}

}  // namespace kvlapse
