// The CPU's Backend: Highway kernels, dispatched at run time (AVX2, AVX-512, scalar: the same bits), on a
// fixed team of threads. The reference that other backends are compared with.
#pragma once

#include <memory>

#include "core/ops/backend.h"

namespace kvlapse {

// n_threads 0: one per available core.
std::unique_ptr<Backend> make_cpu_backend(int n_threads = 0, MatmulMode mode = MatmulMode::exact);

// Some matrix is of a type that MatmulMode::int16 multiplies in integers.
bool has_integer_products(const TransformerWeights& weights);

}  // namespace kvlapse
