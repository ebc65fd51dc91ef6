// config.json: what is accepted must give a RoPE table.
#include "core/base/error.h"
#include "core/model/model_config.h"
#include "tests/fuzz/memory_file.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace kvlapse;
  static const fuzz::MemoryFolder folder("config.json");
  fuzz::MemoryFile input(data, size);
  try {
    ModelSpec spec = read_model_config(folder.with(input));
    rope_table(spec.rope, spec.layer.head_dim);
  } catch (const Error&) {
  }
  return 0;
}
