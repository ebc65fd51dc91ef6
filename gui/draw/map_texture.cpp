#include "gui/draw/map_texture.h"

#include <algorithm>
#include <cstring>

#include "imgui_internal.h"

namespace kvlapse::gui {
namespace {

constexpr int kGrain = 128;  // textures grow in steps, so that resizing a window seldom makes a new one

// Textures that are no longer drawn; they go when the renderer has let go of them.
std::vector<ImTextureData*>& retired() {
  static std::vector<ImTextureData*> list;
  return list;
}

void release(ImTextureData* data) {
  ImGui::UnregisterUserTexture(data);
  IM_DELETE(data);
}

void collect_retired() {
  std::erase_if(retired(), [](ImTextureData* data) {
    if (data->Status != ImTextureStatus_Destroyed) return false;
    release(data);
    return true;
  });
}

}  // namespace

MapTexture::~MapTexture() {
  if (data_ != nullptr) release(data_);  // the renderer is gone by now
  for (ImTextureData* data : retired()) release(data);
  retired().clear();
}

ImVec2 MapTexture::uv_max() const {
  return {static_cast<float>(width_) / static_cast<float>(data_->Width),
          static_cast<float>(height_) / static_cast<float>(data_->Height)};
}

void MapTexture::show(uint64_t id, int width, int height, std::span<const uint32_t> pixels) {
  collect_retired();
  if (id == id_ && data_ != nullptr) return;
  id_ = id;
  if (data_ == nullptr || data_->Width < width || data_->Height < height) {
    if (data_ != nullptr) {
      data_->SetStatus(ImTextureStatus_WantDestroy);
      retired().push_back(data_);
    }
    data_ = IM_NEW(ImTextureData)();
    data_->Create(ImTextureFormat_RGBA32, (width + kGrain - 1) / kGrain * kGrain,
                  (height + kGrain - 1) / kGrain * kGrain);
    data_->UseColors = true;
    data_->RefCount = 1;
    data_->SetStatus(ImTextureStatus_WantCreate);
    ImGui::RegisterUserTexture(data_);
  }
  width_ = width, height_ = height;
  int first = height, last = -1;
  for (int row = 0; row < height; ++row) {
    void* to = data_->GetPixelsAt(0, row);
    const uint32_t* from = pixels.data() + static_cast<size_t>(row) * width;
    if (std::memcmp(to, from, static_cast<size_t>(width) * 4) == 0) continue;
    std::memcpy(to, from, static_cast<size_t>(width) * 4);
    first = std::min(first, row);
    last = row;
  }
  if (last < first || data_->Status == ImTextureStatus_WantCreate) return;
  const ImTextureRect rect{0, static_cast<unsigned short>(first), static_cast<unsigned short>(width),
                           static_cast<unsigned short>(last - first + 1)};
  if (data_->Status == ImTextureStatus_WantUpdates) {
    const int bottom = std::max(data_->UpdateRect.y + data_->UpdateRect.h, last + 1),
              top = std::min<int>(data_->UpdateRect.y, first);
    const int right = std::max<int>(data_->UpdateRect.x + data_->UpdateRect.w, width);
    data_->UpdateRect = {0, static_cast<unsigned short>(top), static_cast<unsigned short>(right),
                         static_cast<unsigned short>(bottom - top)};
  } else {
    data_->UpdateRect = rect;
  }
  data_->Updates.push_back(rect);
  data_->SetStatus(ImTextureStatus_WantUpdates);
}

}  // namespace kvlapse::gui
