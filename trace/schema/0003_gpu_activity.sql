-- What the GPU did: tables with the names and columns of Nsight Systems' SQLite export, and ours (KV_) beside them.
-- All times are nanoseconds since the session began, as KV_STEP.start_ns.

CREATE TABLE META_DATA_EXPORT(name TEXT NOT NULL, value TEXT);
INSERT INTO META_DATA_EXPORT(name, value) VALUES('EXPORT_SCHEMA_VERSION', '3.28.1'), ('EXPORT_PRODUCT_NAME', 'kvlapse');

CREATE TABLE StringIds(id INTEGER NOT NULL PRIMARY KEY, value TEXT NOT NULL);

CREATE TABLE TARGET_INFO_SESSION_START_TIME(utcEpochNs INTEGER, utcTime TEXT, localTime TEXT, systemClockNs INTEGER,
  sessionStartCntVctNs INTEGER);

CREATE TABLE TARGET_INFO_GPU(vmId INTEGER NOT NULL, id INTEGER NOT NULL, name TEXT, busLocation TEXT,
  isDiscrete INTEGER, l2CacheSize INTEGER, totalMemory INTEGER, memoryBandwidth INTEGER, clockRate INTEGER,
  smCount INTEGER, pwGpuId INTEGER, uuid TEXT, luid INTEGER, chipName TEXT, cuDevice INTEGER, ctxswDevPath TEXT,
  ctrlDevPath TEXT, revision INTEGER, nodeMask INTEGER, constantMemory INTEGER, maxIPC INTEGER,
  maxRegistersPerBlock INTEGER, maxShmemPerBlock INTEGER, maxShmemPerBlockOptin INTEGER, maxShmemPerSm INTEGER,
  maxRegistersPerSm INTEGER, threadsPerWarp INTEGER, asyncEngines INTEGER, maxWarpsPerSm INTEGER,
  maxBlocksPerSm INTEGER, maxThreadsPerBlock INTEGER, maxBlockDimX INTEGER, maxBlockDimY INTEGER,
  maxBlockDimZ INTEGER, maxGridDimX INTEGER, maxGridDimY INTEGER, maxGridDimZ INTEGER, computeMajor INTEGER,
  computeMinor INTEGER, smMajor INTEGER, smMinor INTEGER, numaNodeId INTEGER);

CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL(start INTEGER NOT NULL, "end" INTEGER NOT NULL, deviceId INTEGER NOT NULL,
  contextId INTEGER NOT NULL, greenContextId INTEGER, streamId INTEGER NOT NULL, correlationId INTEGER,
  globalPid INTEGER, demangledName INTEGER NOT NULL, shortName INTEGER NOT NULL, mangledName INTEGER,
  launchType INTEGER, cacheConfig INTEGER, registersPerThread INTEGER NOT NULL, gridX INTEGER NOT NULL,
  gridY INTEGER NOT NULL, gridZ INTEGER NOT NULL, blockX INTEGER NOT NULL, blockY INTEGER NOT NULL,
  blockZ INTEGER NOT NULL, staticSharedMemory INTEGER NOT NULL, dynamicSharedMemory INTEGER NOT NULL,
  localMemoryPerThread INTEGER NOT NULL, localMemoryTotal INTEGER NOT NULL, gridId INTEGER NOT NULL,
  sharedMemoryExecuted INTEGER, graphNodeId INTEGER, sharedMemoryLimitConfig INTEGER, qmdBulkReleaseDone INTEGER,
  qmdPreexitDone INTEGER, qmdLastCtaDone INTEGER, graphId INTEGER, clusterX INTEGER, clusterY INTEGER,
  clusterZ INTEGER, clusterSchedulingPolicy INTEGER, maxPotentialClusterSize INTEGER, maxActiveClusters INTEGER,
  sharedMemoryRequestedPercentage INTEGER, tensorSizeMinusOneElements TEXT NOT NULL);

CREATE TABLE CUPTI_ACTIVITY_KIND_MEMCPY(start INTEGER NOT NULL, "end" INTEGER NOT NULL, deviceId INTEGER NOT NULL,
  contextId INTEGER NOT NULL, greenContextId INTEGER, streamId INTEGER NOT NULL, correlationId INTEGER,
  globalPid INTEGER, bytes INTEGER NOT NULL, copyKind INTEGER NOT NULL, deprecatedSrcId INTEGER, srcKind INTEGER,
  dstKind INTEGER, srcDeviceId INTEGER, srcContextId INTEGER, dstDeviceId INTEGER, dstContextId INTEGER,
  migrationCause INTEGER, graphNodeId INTEGER, virtualAddress INTEGER, copyCount INTEGER);

CREATE TABLE CUPTI_ACTIVITY_KIND_MEMSET(start INTEGER NOT NULL, "end" INTEGER NOT NULL, deviceId INTEGER NOT NULL,
  contextId INTEGER NOT NULL, greenContextId INTEGER, streamId INTEGER NOT NULL, correlationId INTEGER,
  globalPid INTEGER, value INTEGER NOT NULL, bytes INTEGER NOT NULL, graphNodeId INTEGER, memKind INTEGER);

CREATE TABLE NVTX_EVENTS(start INTEGER NOT NULL, "end" INTEGER, eventType INTEGER NOT NULL, rangeId INTEGER,
  category INTEGER, color INTEGER, text TEXT, globalTid INTEGER, endGlobalTid INTEGER, textId INTEGER,
  domainId INTEGER, uint64Value INTEGER, int64Value INTEGER, doubleValue REAL, uint32Value INTEGER,
  int32Value INTEGER, floatValue REAL, jsonTextId INTEGER, jsonText TEXT, binaryData TEXT,
  eventId INTEGER NOT NULL PRIMARY KEY);

CREATE TABLE ENUM_CUDA_MEMCPY_OPER(id INTEGER NOT NULL PRIMARY KEY, name TEXT, label TEXT);
INSERT INTO ENUM_CUDA_MEMCPY_OPER VALUES(1, 'CUDA_MEMCPY_KIND_HTOD', 'Host-to-Device'),
  (2, 'CUDA_MEMCPY_KIND_DTOH', 'Device-to-Host'), (8, 'CUDA_MEMCPY_KIND_DTOD', 'Device-to-Device'),
  (9, 'CUDA_MEMCPY_KIND_HTOH', 'Host-to-Host'), (10, 'CUDA_MEMCPY_KIND_PTOP', 'Peer-to-Peer');
CREATE TABLE ENUM_CUDA_MEM_KIND(id INTEGER NOT NULL PRIMARY KEY, name TEXT, label TEXT);
INSERT INTO ENUM_CUDA_MEM_KIND VALUES(0, 'CUDA_MEMOPR_MEMORY_KIND_PAGEABLE', 'Pageable'),
  (1, 'CUDA_MEMOPR_MEMORY_KIND_PINNED', 'Pinned'), (2, 'CUDA_MEMOPR_MEMORY_KIND_DEVICE', 'Device'),
  (3, 'CUDA_MEMOPR_MEMORY_KIND_ARRAY', 'Array'), (4, 'CUDA_MEMOPR_MEMORY_KIND_MANAGED', 'Managed'),
  (5, 'CUDA_MEMOPR_MEMORY_KIND_DEVICE_STATIC', 'Device Static'),
  (6, 'CUDA_MEMOPR_MEMORY_KIND_MANAGED_STATIC', 'Managed Static'), (7, 'CUDA_MEMOPR_MEMORY_KIND_UNKNOWN', 'Unknown');

-- Each source of GPU facts that was asked for, and why it is missing.
CREATE TABLE KV_SOURCE(
  name TEXT NOT NULL PRIMARY KEY, -- 'activity', 'dram' or 'kernels'
  state TEXT NOT NULL,            -- 'recorded', 'partial' or 'missing'
  provenance TEXT NOT NULL,       -- 'measured' or 'sampled'
  reason TEXT NOT NULL,           -- why it is missing or partial, '' otherwise
  advice TEXT NOT NULL,           -- what to do about it
  records INTEGER NOT NULL,
  dropped INTEGER NOT NULL,       -- records that the profiler lost
  overhead_ns INTEGER             -- time that the decoding thread spent on this source
) WITHOUT ROWID;

-- Pairs of one instant on both clocks: how profiler times became session times (linear between them).
CREATE TABLE KV_CLOCK(
  profiler_ns INTEGER NOT NULL,
  session_ns INTEGER NOT NULL
);

-- What we know of a kernel beyond the profiler's row: the step and layer that it served, and its bytes.
CREATE TABLE KV_LAUNCH(
  kernel INTEGER NOT NULL PRIMARY KEY, -- rowid of CUPTI_ACTIVITY_KIND_KERNEL
  step INTEGER NOT NULL,               -- ordinal of the batch's step, NVTX_EVENTS.int64Value
  layer INTEGER,                       -- NULL: of no layer
  phase TEXT,                          -- a phase of KV_STEP
  launch TEXT,                         -- our name of the launch
  modelled_bytes INTEGER               -- that the launch should move through device memory
);
CREATE INDEX KV_LAUNCH_STEP ON KV_LAUNCH(step, layer);

-- Hardware counters of single kernels, on the steps that were counted. Their times are no timing figures.
CREATE TABLE KV_KERNEL_COUNTER(
  step INTEGER NOT NULL,
  ordinal INTEGER NOT NULL,       -- of the kernel in its step
  layer INTEGER,                  -- NULL: of no layer
  phase TEXT,
  launch TEXT,                    -- our name of the launch, NULL: not known
  modelled_bytes INTEGER,
  duration_ns REAL NOT NULL,
  dram_read_bytes REAL NOT NULL,
  dram_write_bytes REAL NOT NULL,
  l2_bytes REAL NOT NULL,
  dram_percent REAL NOT NULL,     -- of the peak while the kernel ran
  warps_percent REAL NOT NULL,    -- active, of the peak
  bytes_ratio REAL,               -- (dram_read_bytes + dram_write_bytes) / modelled_bytes
  PRIMARY KEY(step, ordinal)
) WITHOUT ROWID;

-- Memory traffic over time, sampled by the hardware.
CREATE TABLE KV_DRAM_SAMPLE(
  start_ns INTEGER NOT NULL,
  end_ns INTEGER NOT NULL,
  read_bytes INTEGER NOT NULL,
  write_bytes INTEGER NOT NULL,
  l2_bytes INTEGER NOT NULL
);
