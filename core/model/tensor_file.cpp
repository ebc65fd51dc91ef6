#include "core/model/tensor_file.h"

#include "core/base/error.h"

namespace kvlapse {

const TensorView* TensorFile::find(std::string_view name) const {
  for (const TensorView& t : tensors())
    if (t.name == name) return &t;
  return nullptr;
}

const TensorView& TensorFile::get(std::string_view name) const {
  if (const TensorView* t = find(name)) return *t;
  fail("{}: tensor '{}' is missing", describe(), name);
}

}  // namespace kvlapse
