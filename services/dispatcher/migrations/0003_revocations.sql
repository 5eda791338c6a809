-- Runs of a session, or of a user, are cancelled when that is withdrawn for reasons of security.
ALTER TABLE dispatcher.runs
    ADD COLUMN session_id uuid,
    ADD COLUMN cancelled_by text NOT NULL DEFAULT 'user' CHECK (cancelled_by IN ('user', 'security'));
COMMENT ON COLUMN dispatcher.runs.session_id IS 'The session the run was started in; null for runs older than this column.';
COMMENT ON COLUMN dispatcher.runs.cancelled_by IS 'Who asked, once cancelled_at is set.';
CREATE INDEX runs_of_session ON dispatcher.runs (session_id) WHERE state IN ('queued', 'running', 'suspended');

GRANT INSERT (session_id) ON dispatcher.runs TO netra_dispatcher;
GRANT UPDATE (cancelled_at, cancelled_by) ON dispatcher.runs TO netra_dispatcher_system;
