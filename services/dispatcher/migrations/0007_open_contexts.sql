-- A run that ended while the context service was away: its context is still to be closed, and until then its thread cannot be erased.
ALTER TABLE dispatcher.runs ADD COLUMN context_open boolean NOT NULL DEFAULT false;
COMMENT ON COLUMN dispatcher.runs.context_open IS 'The run has ended, and its context could not be closed yet.';
CREATE INDEX runs_context_open ON dispatcher.runs (run_id) WHERE context_open;
GRANT UPDATE (context_open) ON dispatcher.runs TO netra_dispatcher_system;
