-- What of a trace a cell covers, and the view with it.

ALTER TABLE KV_CELL ADD COLUMN selection TEXT NOT NULL DEFAULT '';  -- options that chose a part; '': everything

DROP VIEW KV_RESULT;
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
         c.open_loop, c.selection
  FROM KV_CELL c JOIN KV_TRACE t ON t.trace = c.trace JOIN KV_VALUE v ON v.cell = c.cell AND v.sequence = -1
  GROUP BY c.cell ORDER BY t.name, c.policy, c.budget_slots;
