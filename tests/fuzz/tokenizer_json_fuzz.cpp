// tokenizer.json: what can be opened must encode and decode.
#include "core/base/error.h"
#include "core/model/tokenizer.h"
#include "tests/fuzz/memory_file.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace kvlapse;
  fuzz::MemoryFile input(data, size);
  try {
    auto tokenizer = open_tokenizer_json(input.path());
    for (SpecialTokens mode : {SpecialTokens::parse, SpecialTokens::plain}) {
      auto ids = tokenizer->encode("ab a\xc3\xa9 12<|end|>  \n<think>x", mode);
      StreamDecoder stream(*tokenizer);
      for (int32_t id : ids) stream.push(id);
      stream.finish();
    }
  } catch (const Error&) {
  }
  return 0;
}
