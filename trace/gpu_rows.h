// Writes batches of GpuBatch into the tables of schema 3. Belongs to the thread that owns the connection; the
// caller begins and commits transactions.
#pragma once

#include <memory>

#include "trace/gpu_records.h"
#include "trace/sqlite.h"

namespace kvlapse {

class GpuRows {
 public:
  explicit GpuRows(Database& database);
  ~GpuRows();
  GpuRows(const GpuRows&) = delete;
  GpuRows& operator=(const GpuRows&) = delete;
  void write(const GpuBatch& batch);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// What was stored of the sources that were asked for, in order of their names; empty for older formats.
std::vector<GpuSource> load_gpu_sources(Database& database);

}  // namespace kvlapse
