// MapTexture: pixels of a map on the GPU. Owned by one panel; UI thread only. Only changed rows are sent.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "imgui.h"

namespace kvlapse::gui {

class MapTexture {
 public:
  MapTexture() = default;
  ~MapTexture();
  MapTexture(const MapTexture&) = delete;
  MapTexture& operator=(const MapTexture&) = delete;

  // `id` tells pictures apart: nothing happens while it stays the same.
  void show(uint64_t id, int width, int height, std::span<const uint32_t> pixels);
  bool empty() const { return data_ == nullptr; }
  ImTextureRef texture() const { return data_->GetTexRef(); }
  ImVec2 uv_max() const;  // the picture fills [0, uv_max]

 private:
  ImTextureData* data_ = nullptr;
  uint64_t id_ = 0;
  int width_ = 0, height_ = 0;
};

}  // namespace kvlapse::gui
