-- The runs and events of one thread, whoever owns them: shown to a transaction that a grant token named the thread for.
-- Erasure of what is in the events of one thread.

CREATE INDEX heads_of_thread ON events.heads (thread_id, run_id);
-- not by the time of the last event: an index of what changes with each append would be written with each
CREATE INDEX heads_going_on ON events.heads (thread_id, run_id) WHERE NOT ended;
CREATE POLICY of_thread ON events.heads FOR SELECT TO netra_events
    USING (thread_id = NULLIF(current_setting('netra.thread_id', true), '')::uuid);
CREATE POLICY of_thread ON events.events FOR SELECT TO netra_events
    USING (thread_id = NULLIF(current_setting('netra.thread_id', true), '')::uuid);

-- null for the whole record
ALTER TABLE events.erasures ADD COLUMN thread_id uuid;
GRANT INSERT (thread_id) ON events.erasures TO netra_events;
GRANT SELECT (thread_id) ON events.erasures TO netra_events_system;
-- an event keeps its place: only what it says is taken away
GRANT UPDATE (frame) ON events.events TO netra_events;
