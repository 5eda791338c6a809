-- The runs of one thread, whoever owns them: shown to a transaction that a grant token named the thread for; cancelled by its owner.

CREATE INDEX runs_by_thread ON dispatcher.runs (thread_id, run_id DESC);
CREATE POLICY of_thread ON dispatcher.runs FOR SELECT TO netra_dispatcher
    USING (thread_id = NULLIF(current_setting('netra.thread_id', true), '')::uuid);
CREATE POLICY of_owned_thread ON dispatcher.runs FOR UPDATE TO netra_dispatcher
    USING (thread_id = NULLIF(current_setting('netra.owned_thread_id', true), '')::uuid)
    WITH CHECK (thread_id = NULLIF(current_setting('netra.owned_thread_id', true), '')::uuid);
