-- How many runs of a user may execute at a time depends on the tier they were started in.
ALTER TABLE dispatcher.runs ADD COLUMN tier text NOT NULL DEFAULT 'free';
CREATE INDEX runs_executing ON dispatcher.runs (user_id) WHERE kind = 'agent' AND state = 'running';
CREATE INDEX runs_owned ON dispatcher.runs (run_id) WHERE state IN ('running', 'finishing');
CREATE INDEX runs_cancelled ON dispatcher.runs (run_id) WHERE state = 'queued' AND cancelled_at IS NOT NULL;
GRANT INSERT (tier) ON dispatcher.runs TO netra_dispatcher;
