// safetensors: header and tensors.
#include "core/base/error.h"
#include "core/model/tensor_file.h"
#include "tests/fuzz/memory_file.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace kvlapse;
  fuzz::MemoryFile input(data, size);
  try {
    auto file = open_safetensors(input.path());
    for (const TensorView& tensor : file->tensors()) {
      if (tensor.bytes == 0) continue;
      volatile std::byte first = tensor.data[0], last = tensor.data[tensor.bytes - 1];
      (void)first, (void)last;
    }
  } catch (const Error&) {
  }
  return 0;
}
