-- First format of a kvlapse trace. Every table and column: trace/FORMAT.md.

CREATE TABLE KV_META(
  key TEXT NOT NULL PRIMARY KEY,
  value TEXT NOT NULL
) WITHOUT ROWID;

CREATE TABLE KV_POLICY(
  name TEXT NOT NULL PRIMARY KEY,
  kind TEXT NOT NULL,             -- 'identity', 'rule' or 'parameter'
  value NOT NULL,                 -- number or text
  summary TEXT NOT NULL
) WITHOUT ROWID;

CREATE TABLE KV_LAYER(
  layer INTEGER NOT NULL PRIMARY KEY,
  budget_slots INTEGER,           -- NULL: the policy never evicts
  rows_recorded INTEGER NOT NULL  -- 1: q, k, v or sketches of this layer are in the file, as the tier says
);

CREATE TABLE KV_SEQUENCE(
  sequence INTEGER NOT NULL PRIMARY KEY,
  seed INTEGER NOT NULL,
  n_prompt INTEGER NOT NULL,
  n_steps INTEGER NOT NULL,
  budget_slots INTEGER,           -- NULL: the policy never evicts
  think_begin INTEGER,
  think_end INTEGER,
  task TEXT,
  prompt TEXT,
  text TEXT,
  answer TEXT,
  answer_right INTEGER,
  end_reason TEXT
);

CREATE TABLE KV_STEP(
  sequence INTEGER NOT NULL,
  step INTEGER NOT NULL,
  token INTEGER NOT NULL,
  next_token INTEGER NOT NULL,
  logprob REAL,
  margin REAL,
  held_tokens INTEGER NOT NULL,
  evicted_tokens INTEGER NOT NULL,
  start_ns INTEGER NOT NULL,
  total_ns INTEGER NOT NULL,
  embed_ns INTEGER NOT NULL,
  attention_ns INTEGER NOT NULL,
  matmul_ns INTEGER NOT NULL,
  evict_ns INTEGER NOT NULL,
  head_ns INTEGER NOT NULL,
  sample_ns INTEGER NOT NULL,
  observe_ns INTEGER NOT NULL,
  queue_wait_ns INTEGER NOT NULL,
  PRIMARY KEY(sequence, step)
) WITHOUT ROWID;

CREATE TABLE KV_CHUNK(
  id INTEGER NOT NULL PRIMARY KEY,
  kind TEXT NOT NULL,             -- 'tokens', 'occupancy', 'evictions', 'sketch', 'q', 'k' or 'v'
  sequence INTEGER NOT NULL,
  layer INTEGER NOT NULL,         -- -1: not of one layer
  step_begin INTEGER NOT NULL,
  step_end INTEGER NOT NULL,      -- exclusive
  encoding TEXT NOT NULL,         -- 'raw', 'zstd' or 'zstd-shuffleN'
  raw_bytes INTEGER NOT NULL,
  checksum INTEGER NOT NULL,      -- XXH3, 64 bits, of the decoded bytes
  data BLOB NOT NULL
);
CREATE INDEX KV_CHUNK_KEY ON KV_CHUNK(kind, sequence, layer, step_begin, step_end, encoding, raw_bytes, checksum);
