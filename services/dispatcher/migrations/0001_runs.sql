-- Runs and their leases. A user's rows are shown to that user alone; what crosses users (claims, leases, ends) is the
-- system role's, column by column.
CREATE TABLE dispatcher.runs (
    run_id            uuid PRIMARY KEY,
    user_id           uuid NOT NULL,
    thread_id         uuid NOT NULL,
    request_id        text NOT NULL,
    digest            bytea NOT NULL,
    message_id        uuid,
    kind              text NOT NULL CHECK (kind IN ('agent', 'tool')),
    agent             text NOT NULL,
    request           text NOT NULL,
    inputs            bytea NOT NULL,
    deadline_s        double precision NOT NULL CHECK (deadline_s > 0),
    context           bytea NOT NULL,
    context_token     text NOT NULL,
    token_renewed_at  timestamptz NOT NULL DEFAULT now(),
    correlation_id    text NOT NULL,
    traceparent       text NOT NULL,
    state             text NOT NULL CHECK (state IN
        ('created', 'queued', 'running', 'suspended', 'finishing', 'completed', 'failed', 'cancelled', 'timed_out')),
    epoch             bigint NOT NULL DEFAULT 0,
    lease_owner       text,
    lease_until       timestamptz,
    cancelled_at      timestamptz,
    outcome           bytea,
    -- not now(): starts of one user queue up inside their transactions, and their order here is the order they run in
    created_at        timestamptz NOT NULL DEFAULT clock_timestamp(),
    started_at        timestamptz,
    ended_at          timestamptz,
    UNIQUE (user_id, request_id)
);
CREATE INDEX runs_by_user ON dispatcher.runs (user_id, run_id DESC);
-- what may be claimed, and what stands before it on its thread
CREATE INDEX runs_waiting ON dispatcher.runs (created_at, run_id) WHERE state IN ('queued', 'running', 'finishing');
CREATE INDEX runs_of_thread ON dispatcher.runs (thread_id, created_at, run_id) WHERE state IN ('queued', 'running', 'suspended');

ALTER TABLE dispatcher.runs ENABLE ROW LEVEL SECURITY;
ALTER TABLE dispatcher.runs FORCE ROW LEVEL SECURITY;
CREATE POLICY own ON dispatcher.runs TO netra_dispatcher
    USING (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid)
    WITH CHECK (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid);
CREATE POLICY system ON dispatcher.runs TO netra_dispatcher_system USING (true) WITH CHECK (true);

GRANT USAGE ON SCHEMA dispatcher TO netra_dispatcher, netra_dispatcher_system;
GRANT SELECT ON dispatcher.migrations TO netra_dispatcher, netra_dispatcher_system;
GRANT SELECT (run_id, user_id, thread_id, request_id, digest, message_id, kind, agent, state, cancelled_at, outcome,
              correlation_id, created_at, started_at, ended_at),
      INSERT (run_id, user_id, thread_id, request_id, digest, message_id, kind, agent, request, inputs, deadline_s, context,
              context_token, correlation_id, traceparent, state, epoch, lease_owner, lease_until, started_at),
      UPDATE (cancelled_at)
    ON dispatcher.runs TO netra_dispatcher;
GRANT SELECT,
      UPDATE (state, epoch, lease_owner, lease_until, context_token, token_renewed_at, outcome, started_at, ended_at)
    ON dispatcher.runs TO netra_dispatcher_system;
