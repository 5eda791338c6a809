-- The record: one head per run, one cursor row per user, the events, the results of steps.
-- Counters under row locks carry uniqueness and contiguity: no sequence can, for a rolled back one leaves a hole.

CREATE TABLE events.generation (
    single boolean PRIMARY KEY DEFAULT true CHECK (single),
    id uuid NOT NULL DEFAULT gen_random_uuid()
);
INSERT INTO events.generation DEFAULT VALUES;

CREATE TABLE events.heads (
    run_id uuid PRIMARY KEY,
    user_id uuid NOT NULL,
    thread_id uuid NOT NULL,
    request_id text NOT NULL,
    correlation_id text NOT NULL,
    trace_id text NOT NULL,
    retention text NOT NULL,
    deadline timestamptz,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    epoch bigint NOT NULL DEFAULT 0,
    next_seq bigint NOT NULL DEFAULT 1,
    last_digest bytea,
    last_first_seq bigint NOT NULL DEFAULT 0,
    last_cursor bigint NOT NULL DEFAULT 0,
    last_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    ended boolean NOT NULL DEFAULT false,
    terminal_type text NOT NULL DEFAULT ''
) WITH (fillfactor = 50);
CREATE INDEX heads_user ON events.heads (user_id, created_at);

CREATE TABLE events.cursors (
    user_id uuid PRIMARY KEY,
    last bigint NOT NULL DEFAULT 0,
    oldest bigint NOT NULL DEFAULT 1
) WITH (fillfactor = 50);

CREATE TABLE events.events (
    retention text NOT NULL,
    recorded_at timestamptz NOT NULL,
    user_id uuid NOT NULL,
    cursor bigint NOT NULL,
    run_id uuid,
    seq bigint NOT NULL,
    thread_id uuid,
    event_id uuid NOT NULL,
    type text NOT NULL,
    tool_call_id text NOT NULL DEFAULT '',
    ends boolean NOT NULL DEFAULT false,
    frame bytea NOT NULL
) PARTITION BY LIST (retention);
CREATE TABLE events.events_other PARTITION OF events.events DEFAULT PARTITION BY RANGE (recorded_at);
CREATE TABLE events.events_other_always PARTITION OF events.events_other DEFAULT;
CREATE INDEX events_user_cursor ON events.events (user_id, cursor);
CREATE INDEX events_user_run_seq ON events.events (user_id, run_id, seq);

CREATE TABLE events.steps (
    run_id uuid NOT NULL,
    key text NOT NULL,
    result bytea NOT NULL,
    user_id uuid NOT NULL,
    PRIMARY KEY (run_id, key)
);

-- Partitions have no policy of their own: nobody comes in but through the parent.
ALTER TABLE events.heads ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
ALTER TABLE events.cursors ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
ALTER TABLE events.events ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
ALTER TABLE events.events_other ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
ALTER TABLE events.events_other_always ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
ALTER TABLE events.steps ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;

CREATE POLICY own_heads ON events.heads TO netra_events
    USING (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid)
    WITH CHECK (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid);
CREATE POLICY own_cursors ON events.cursors TO netra_events
    USING (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid)
    WITH CHECK (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid);
CREATE POLICY own_events ON events.events TO netra_events
    USING (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid)
    WITH CHECK (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid);
CREATE POLICY own_steps ON events.steps TO netra_events
    USING (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid)
    WITH CHECK (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid);

CREATE POLICY system_heads ON events.heads TO netra_events_system USING (true) WITH CHECK (true);
CREATE POLICY system_cursors ON events.cursors TO netra_events_system USING (true) WITH CHECK (true);
CREATE POLICY system_events ON events.events TO netra_events_system USING (true) WITH CHECK (true);
CREATE POLICY system_steps ON events.steps TO netra_events_system USING (true) WITH CHECK (true);

GRANT USAGE ON SCHEMA events TO netra_events, netra_events_system;
GRANT SELECT ON events.migrations, events.generation TO netra_events, netra_events_system;

-- One user at a time: opens runs and reads.
GRANT SELECT ON events.heads, events.cursors, events.events, events.steps TO netra_events;
GRANT INSERT (run_id, user_id, thread_id, request_id, correlation_id, trace_id, retention, deadline), UPDATE (epoch)
    ON events.heads TO netra_events;
GRANT INSERT (user_id) ON events.cursors TO netra_events;

-- Across users: the batching writer and the comparison of cursors. It reads of an event what tells a repeated append.
GRANT SELECT ON events.heads, events.cursors TO netra_events_system;
GRANT UPDATE (next_seq, last_digest, last_first_seq, last_cursor, last_at, ended, terminal_type)
    ON events.heads TO netra_events_system;
GRANT UPDATE (last) ON events.cursors TO netra_events_system;
GRANT INSERT ON events.events, events.steps TO netra_events_system;
GRANT SELECT (user_id, run_id, seq, cursor, event_id, type) ON events.events TO netra_events_system;
GRANT SELECT (user_id, run_id, key) ON events.steps TO netra_events_system;
