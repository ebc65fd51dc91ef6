#include "replay/sketch.h"

#include <cmath>
#include <cstring>

#include "core/base/error.h"

namespace kvlapse {

double Sketch::middle(int bin) {
  if (bin == 0) return 0;
  const int exponent = (bin - 1) / kPerOctave + kMinExponent, part = (bin - 1) % kPerOctave;
  return std::ldexp(1.0 + (part + 0.5) / kPerOctave, exponent);
}

uint32_t& Sketch::at(int bin) {
  if (bin == 0) return zeros_;
  const int octave = (bin - 1) / kPerOctave * kPerOctave + 1;
  if (bins_.empty()) {
    first_ = octave;
    bins_.resize(kPerOctave);
  } else if (octave < first_) {
    bins_.insert(bins_.begin(), static_cast<size_t>(first_ - octave), 0u);
    first_ = octave;
  } else if (bin - first_ >= static_cast<int>(bins_.size())) {
    bins_.resize(static_cast<size_t>(octave + kPerOctave - first_));
  }
  return bins_[static_cast<size_t>(bin - first_)];
}

void Sketch::add(std::span<const uint32_t> counts) {
  for (size_t bin = 0; bin < counts.size(); ++bin) {
    if (counts[bin] == 0) continue;
    at(static_cast<int>(bin)) += counts[bin];
    count_ += counts[bin];
  }
}

void Sketch::merge(const Sketch& other) {
  zeros_ += other.zeros_;
  for (size_t i = 0; i < other.bins_.size(); ++i)
    if (other.bins_[i] != 0) at(other.first_ + static_cast<int>(i)) += other.bins_[i];
  count_ += other.count_;
}

double Sketch::quantile(double q) const {
  if (count_ == 0) return 0;
  const auto rank = static_cast<int64_t>(q * static_cast<double>(count_ - 1));
  int64_t seen = zeros_;
  if (seen > rank) return 0;
  for (size_t i = 0; i < bins_.size(); ++i) {
    seen += bins_[i];
    if (seen > rank) return middle(first_ + static_cast<int>(i));
  }
  return 0;
}

double Sketch::share_above(double value) const {
  if (count_ == 0) return 0;
  const int own = bin_of(static_cast<float>(value));
  int64_t above = 0;
  for (size_t i = 0; i < bins_.size(); ++i)
    if (first_ + static_cast<int>(i) > own) above += bins_[i];
  return static_cast<double>(above) / static_cast<double>(count_);
}

std::vector<std::byte> Sketch::bytes() const {
  std::vector<std::byte> out;
  auto put = [&](int bin, uint32_t count) {
    if (count == 0) return;
    const uint32_t pair[2] = {static_cast<uint32_t>(bin), count};
    out.resize(out.size() + sizeof pair);
    std::memcpy(out.data() + out.size() - sizeof pair, pair, sizeof pair);
  };
  put(0, zeros_);
  for (size_t i = 0; i < bins_.size(); ++i) put(first_ + static_cast<int>(i), bins_[i]);
  return out;
}

Sketch Sketch::from_bytes(std::span<const std::byte> bytes) {
  Sketch sketch;
  if (bytes.size() % 8 != 0) fail("sketch: expected pairs of 8 bytes, found {} bytes", bytes.size());
  for (size_t offset = 0; offset < bytes.size(); offset += 8) {
    uint32_t pair[2];
    std::memcpy(pair, bytes.data() + offset, sizeof pair);
    if (pair[0] >= static_cast<uint32_t>(kBins))
      fail("sketch: expected bins below {}, found {}", kBins, pair[0]);
    sketch.at(static_cast<int>(pair[0])) += pair[1];
    sketch.count_ += pair[1];
  }
  return sketch;
}

}  // namespace kvlapse
