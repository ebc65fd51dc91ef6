// How record, eval and bench multiply with quantised matrices: one option, one default. `conformance` is
// always exact.
#pragma once

#include <string>

#include "cli/command.h"
#include "core/model/model.h"
#include "core/ops/backend.h"

namespace kvlapse::cli {

// tests/bench/RESULTS.md defends it: twice as fast as exact, SmolLM2's logits within 3e-3 of the reference (weights
// rounded to fp16: 2.4e-2) and no other token in 512.
inline constexpr const char* kDefaultProducts = "int16";

void add_products_option(CLI::App& command, std::string& products);
// Exact for a model without a matrix that could be multiplied in integers, whatever was asked for.
MatmulMode products_of(const std::string& products, const Model& model);
const char* products_name(MatmulMode mode);

}  // namespace kvlapse::cli
