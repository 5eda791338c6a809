-- The runs and events of one thread, whoever owns them: shown to a transaction that a grant token named the thread for.

CREATE INDEX heads_of_thread ON events.heads (thread_id, run_id);
CREATE POLICY of_thread ON events.heads FOR SELECT TO netra_events
    USING (thread_id = NULLIF(current_setting('netra.thread_id', true), '')::uuid);
CREATE POLICY of_thread ON events.events FOR SELECT TO netra_events
    USING (thread_id = NULLIF(current_setting('netra.thread_id', true), '')::uuid);
