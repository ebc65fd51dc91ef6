// The model engine against golden vectors of a reference: tokens, logits, hidden states, q, k, v and
// attention outputs of a decode, and a tokenizer's strings. Always in fp32 and with exact weights. Layout of
// the files: tests/data/README.md.
#pragma once

#include "cli/command.h"
#include "core/model/model.h"
#include "core/ops/backend.h"

namespace kvlapse::cli {

struct ModelCheck {
  Json row;             // as --json prints it
  std::string verdict;  // one line for people
  bool passed = false;
};

bool is_model_golden(const TensorFile& golden);
bool is_tokenizer_golden(const TensorFile& golden);

ModelCheck check_model(const TensorFile& golden, const Model& model, Backend& backend);
ModelCheck check_tokenizer(const TensorFile& golden, const Model& model);

}  // namespace kvlapse::cli
