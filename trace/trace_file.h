// The trace as an SQLite file: its kind, and its header in KV_META, KV_POLICY and KV_LAYER.
#pragma once

#include "trace/sqlite.h"
#include "trace/trace_types.h"

namespace kvlapse {

const FileKind& trace_file_kind();

// Throws Error when the header contradicts itself or its meta uses a key of the format.
void store_header(Database& database, const TraceHeader& header);
// Throws Error naming the key, expected and found.
TraceHeader load_header(Database& database);

using MetaMap = std::map<std::string, std::string>;
MetaMap load_meta(Database& database);
void store_meta(Database& database, const MetaMap& meta);  // replaces

// Over KV_CHUNK in the order (kind, sequence, layer, step_begin), without reading blobs.
std::string compute_content_hash(Database& database, const TraceHeader& header);

// Names of KV_CHUNK.kind.
namespace chunk_kind {
inline constexpr std::string_view kTokens = "tokens", kOccupancy = "occupancy", kEvictions = "evictions",
                                  kSketch = "sketch";
}

}  // namespace kvlapse
