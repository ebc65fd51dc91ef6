// GGUF: header, metadata, tensors, the model that they describe, and the tokenizer.
#include <algorithm>
#include <vector>

#include "core/base/error.h"
#include "core/model/gguf_model.h"
#include "core/model/tokenizer.h"
#include "tests/fuzz/memory_file.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace kvlapse;
  fuzz::MemoryFile input(data, size);
  try {
    GgufFile file(input.path());
    for (const TensorView& tensor : file.tensors()) {
      if (tensor.type == TensorType::i32 || tensor.type == TensorType::i64) continue;
      auto n = std::min<int64_t>(tensor.elements(), 4 * block_elements(tensor.type));
      std::vector<float> values(static_cast<size_t>(n));
      dequantize(tensor.type, tensor.data, n, values.data());
      // The last bytes as well: they are what a wrong size would put outside of the file.
      volatile std::byte last = tensor.data[tensor.bytes - 1];
      (void)last;
    }
    try {
      read_gguf_model(file);
    } catch (const Error&) {
    }
    auto tokenizer = gguf_tokenizer(file);
    auto ids = tokenizer->encode("a b ab\n12 <s>\xc3\xa9", SpecialTokens::parse);
    tokenizer->decode(ids);
    tokenizer->encode("ab<|end|>", SpecialTokens::plain);
  } catch (const Error&) {
  }
  return 0;
}
