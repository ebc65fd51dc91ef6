#include "core/base/tensor_type.h"

#include <array>

namespace kvlapse {
namespace {

struct TypeLayout {
  std::string_view name;
  int elements;
  size_t bytes;
};

// In the order of TensorType. Block layouts: ggml's block_q8_0 ... block_q6_K.
constexpr std::array<TypeLayout, 14> kLayouts{{{"F32", 1, 4},
                                               {"F16", 1, 2},
                                               {"BF16", 1, 2},
                                               {"Q8_0", 32, 34},
                                               {"Q4_0", 32, 18},
                                               {"Q4_1", 32, 20},
                                               {"Q5_0", 32, 22},
                                               {"Q5_1", 32, 24},
                                               {"Q4_K", 256, 144},
                                               {"Q5_K", 256, 176},
                                               {"Q6_K", 256, 210},
                                               {"I32", 1, 4},
                                               {"I64", 1, 8},
                                               {"U8", 1, 1}}};

const TypeLayout& layout(TensorType type) {
  return kLayouts[static_cast<size_t>(type)];
}

}  // namespace

std::string_view tensor_type_name(TensorType type) {
  return layout(type).name;
}
int block_elements(TensorType type) {
  return layout(type).elements;
}
size_t block_bytes(TensorType type) {
  return layout(type).bytes;
}

}  // namespace kvlapse
