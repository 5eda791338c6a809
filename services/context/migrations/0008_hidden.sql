-- Runs whose messages are hidden from the thread, for everybody: those that they have, and those that they still get. The messages
-- themselves stay as they are, for who takes along or erases what is theirs.

CREATE TABLE context.hidden_runs (
    -- whose run it is, and so whose messages are hidden: nobody hides those of another user
    user_id   uuid NOT NULL,
    run_id    uuid NOT NULL,
    -- goes with the last of its thread
    thread_id uuid NOT NULL REFERENCES context.threads ON DELETE CASCADE,
    hidden_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (thread_id, run_id, user_id)
);
ALTER TABLE context.hidden_runs ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
-- by whom the thread is
CREATE POLICY seen ON context.hidden_runs FOR SELECT TO netra_context
    USING (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid
        OR EXISTS (SELECT FROM context.threads AS t WHERE t.thread_id = hidden_runs.thread_id));
CREATE POLICY made ON context.hidden_runs FOR INSERT TO netra_context
    WITH CHECK (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid);
GRANT SELECT, INSERT ON context.hidden_runs TO netra_context;
