-- First format of a kvlapse results file. Every table and column: replay/FORMAT.md.

CREATE TABLE KV_META(
  key TEXT NOT NULL PRIMARY KEY,
  value TEXT NOT NULL
) WITHOUT ROWID;

CREATE TABLE KV_TRACE(
  trace TEXT NOT NULL PRIMARY KEY,  -- content hash
  name TEXT NOT NULL,               -- file name when it was replayed
  model TEXT NOT NULL,
  policy TEXT NOT NULL,             -- it was recorded under
  kv_dtype TEXT NOT NULL,
  n_layers INTEGER NOT NULL,
  n_q_heads INTEGER NOT NULL,
  n_kv_heads INTEGER NOT NULL,
  head_dim INTEGER NOT NULL,
  n_sequences INTEGER NOT NULL,
  n_tokens INTEGER NOT NULL         -- all sequences
) WITHOUT ROWID;

CREATE TABLE KV_CELL(
  cell TEXT NOT NULL PRIMARY KEY,   -- hash of trace, policy with all resolved parameters, budget, selection, versions
  trace TEXT NOT NULL,
  policy TEXT NOT NULL,             -- canonical spec
  budget TEXT NOT NULL,             -- as written, '512' or '25%'
  budget_slots INTEGER NOT NULL,    -- per kv head; the largest of the sequences when it is a share
  budget_share REAL NOT NULL,       -- of the sequence at its end
  match TEXT NOT NULL,              -- 'nominal', or the occupancy that chose budget_slots: 'peak' or 'mean'
  layer_begin INTEGER NOT NULL,
  layer_end INTEGER NOT NULL,
  open_loop INTEGER NOT NULL
) WITHOUT ROWID;

CREATE TABLE KV_VALUE(
  cell TEXT NOT NULL,
  sequence INTEGER NOT NULL,        -- -1: all sequences together
  metric TEXT NOT NULL,
  value REAL NOT NULL,
  PRIMARY KEY(cell, sequence, metric)
) WITHOUT ROWID;

CREATE TABLE KV_HEAD(
  cell TEXT NOT NULL,
  layer INTEGER NOT NULL,
  q_head INTEGER NOT NULL,
  metric TEXT NOT NULL,
  mean REAL NOT NULL,
  p10 REAL NOT NULL,
  p50 REAL NOT NULL,
  p90 REAL NOT NULL,
  PRIMARY KEY(cell, layer, q_head, metric)
) WITHOUT ROWID;

CREATE TABLE KV_SKETCH(
  cell TEXT NOT NULL,
  metric TEXT NOT NULL,
  data BLOB NOT NULL,               -- pairs of uint32, little endian: bin, count
  PRIMARY KEY(cell, metric)
) WITHOUT ROWID;

CREATE TABLE KV_SERIES(
  cell TEXT NOT NULL,
  metric TEXT NOT NULL,
  layer INTEGER NOT NULL,
  n_bins INTEGER NOT NULL,
  data BLOB NOT NULL,               -- [n_q_heads][n_bins] fp32, little endian; NaN: no step in the bin
  PRIMARY KEY(cell, metric, layer)
) WITHOUT ROWID;

CREATE TABLE KV_EVAL(
  model TEXT NOT NULL,
  task TEXT NOT NULL,
  policy TEXT NOT NULL,
  budget TEXT NOT NULL,
  budget_slots INTEGER NOT NULL,
  seed INTEGER NOT NULL,
  n INTEGER NOT NULL,
  correct INTEGER NOT NULL,
  accuracy REAL NOT NULL,
  ci95_low REAL NOT NULL,
  ci95_high REAL NOT NULL,
  tokens_mean REAL NOT NULL,
  length_ratio REAL,                -- of the full cache's length on the same problems; NULL: not run
  first_divergence_median REAL,     -- tokens; NULL: not run, or it never diverged
  open_loop INTEGER NOT NULL,
  PRIMARY KEY(model, task, policy, budget, seed, n)
) WITHOUT ROWID;

CREATE VIEW KV_RESULT AS
  SELECT t.name AS trace, c.policy, c.budget, c.budget_slots, c.budget_share,
         max(CASE v.metric WHEN 'retained_mean' THEN v.value END) AS retained_mean,
         max(CASE v.metric WHEN 'retained_peak' THEN v.value END) AS retained_peak,
         max(CASE v.metric WHEN 'kv_bytes_peak' THEN v.value END) AS kv_bytes_peak,
         max(CASE v.metric WHEN 'evictions' THEN v.value END) AS evictions,
         max(CASE v.metric WHEN 'recall_mean' THEN v.value END) AS recall_mean,
         max(CASE v.metric WHEN 'recall_p10' THEN v.value END) AS recall_p10,
         max(CASE v.metric WHEN 'output_error_mean' THEN v.value END) AS output_error_mean,
         max(CASE v.metric WHEN 'output_error_p90' THEN v.value END) AS output_error_p90,
         max(CASE v.metric WHEN 'topk_recall' THEN v.value END) AS topk_recall,
         c.open_loop
  FROM KV_CELL c JOIN KV_TRACE t ON t.trace = c.trace JOIN KV_VALUE v ON v.cell = c.cell AND v.sequence = -1
  GROUP BY c.cell ORDER BY t.name, c.policy, c.budget_slots;
