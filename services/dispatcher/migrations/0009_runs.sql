-- Runs that survive their owner: versions of agents, takeovers, running time, suspension, messages to a run and approvals.
ALTER TABLE dispatcher.runs
    ADD COLUMN agent_version  text NOT NULL DEFAULT '',
    ADD COLUMN takeovers      integer NOT NULL DEFAULT 0,
    ADD COLUMN ran_s          double precision NOT NULL DEFAULT 0,
    ADD COLUMN running_since  timestamptz,
    ADD COLUMN woken_at       timestamptz,
    ADD COLUMN waits_for      text NOT NULL DEFAULT '' CHECK (waits_for IN ('', 'message', 'approval', 'timer')),
    ADD COLUMN wakes_at       timestamptz,
    ADD COLUMN rolled_back_at timestamptz;
COMMENT ON COLUMN dispatcher.runs.agent_version IS 'Of its start: nobody else carries it on. Empty for runs older than this column.';
COMMENT ON COLUMN dispatcher.runs.takeovers IS 'Claims of a run whose owner let its lease run out.';
COMMENT ON COLUMN dispatcher.runs.ran_s IS 'Running time before running_since.';
COMMENT ON COLUMN dispatcher.runs.woken_at IS 'Something came that the run may wait for; null again once it is claimed.';
COMMENT ON COLUMN dispatcher.runs.wakes_at IS 'When a run that is suspended goes on in any case.';
COMMENT ON COLUMN dispatcher.runs.rolled_back_at IS 'Since then its messages are to be hidden at its end.';
-- what may begin or go on, of one user; users are found by it, each by one look
CREATE INDEX runs_ready ON dispatcher.runs (user_id, created_at, run_id)
    WHERE cancelled_at IS NULL AND (state = 'queued' OR state = 'suspended' AND woken_at IS NOT NULL);
CREATE INDEX runs_asleep ON dispatcher.runs (wakes_at) WHERE state = 'suspended' AND woken_at IS NULL;
-- of one user: each may go on at any moment, so a run that begins at once counts them
CREATE INDEX runs_put_away ON dispatcher.runs (user_id) WHERE kind = 'agent' AND state = 'suspended';
CREATE INDEX runs_tokens ON dispatcher.runs (token_renewed_at) WHERE state IN ('queued', 'suspended');
CREATE INDEX runs_versions ON dispatcher.runs (agent, agent_version)
    WHERE kind = 'agent' AND state IN ('queued', 'running', 'suspended', 'finishing');
DROP INDEX dispatcher.runs_cancelled;
CREATE INDEX runs_cancelled ON dispatcher.runs (run_id) WHERE state IN ('queued', 'suspended') AND cancelled_at IS NOT NULL;
-- who writes to a granted thread may wake its runs
CREATE POLICY of_written_thread ON dispatcher.runs FOR UPDATE TO netra_dispatcher
    USING (thread_id = NULLIF(current_setting('netra.written_thread_id', true), '')::uuid)
    WITH CHECK (thread_id = NULLIF(current_setting('netra.written_thread_id', true), '')::uuid);
GRANT SELECT (agent_version, waits_for), INSERT (agent_version, running_since), UPDATE (woken_at, rolled_back_at)
    ON dispatcher.runs TO netra_dispatcher;
GRANT UPDATE (takeovers, ran_s, running_since, woken_at, waits_for, wakes_at) ON dispatcher.runs TO netra_dispatcher_system;

-- The agents that dispatchers have, and when one last said so. The platform's, not a user's: the system role alone sees them.
CREATE TABLE dispatcher.agents_seen (
    agent    text NOT NULL,
    version  text NOT NULL,
    seen_at  timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (agent, version)
);
ALTER TABLE dispatcher.agents_seen ENABLE ROW LEVEL SECURITY;
ALTER TABLE dispatcher.agents_seen FORCE ROW LEVEL SECURITY;
CREATE POLICY system ON dispatcher.agents_seen TO netra_dispatcher_system USING (true) WITH CHECK (true);
GRANT SELECT, INSERT, UPDATE (seen_at) ON dispatcher.agents_seen TO netra_dispatcher_system;

-- Messages that users sent to a run, in their order. owner_id is whose run it is, user_id who sent it.
CREATE TABLE dispatcher.messages (
    run_id      uuid NOT NULL,
    number      integer NOT NULL CHECK (number > 0),
    message_id  uuid NOT NULL,
    user_id     uuid NOT NULL,
    owner_id    uuid NOT NULL,
    thread_id   uuid NOT NULL,
    request_id  text NOT NULL,
    content     text NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (run_id, number),
    UNIQUE (user_id, request_id)
);
ALTER TABLE dispatcher.messages ENABLE ROW LEVEL SECURITY;
ALTER TABLE dispatcher.messages FORCE ROW LEVEL SECURITY;
CREATE POLICY own ON dispatcher.messages FOR SELECT TO netra_dispatcher
    USING (NULLIF(current_setting('netra.user_id', true), '')::uuid IN (user_id, owner_id));
CREATE POLICY of_thread ON dispatcher.messages FOR SELECT TO netra_dispatcher
    USING (thread_id = NULLIF(current_setting('netra.thread_id', true), '')::uuid);
CREATE POLICY send ON dispatcher.messages FOR INSERT TO netra_dispatcher
    WITH CHECK (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid
        AND (owner_id = user_id OR thread_id = NULLIF(current_setting('netra.written_thread_id', true), '')::uuid)
        AND EXISTS (SELECT FROM dispatcher.runs AS r
            WHERE r.run_id = messages.run_id AND r.user_id = messages.owner_id AND r.thread_id = messages.thread_id));
CREATE POLICY system ON dispatcher.messages TO netra_dispatcher_system USING (true) WITH CHECK (true);
GRANT SELECT, INSERT (run_id, number, message_id, user_id, owner_id, thread_id, request_id, content)
    ON dispatcher.messages TO netra_dispatcher;
GRANT SELECT ON dispatcher.messages TO netra_dispatcher_system;

-- What a run asks people before it goes on. user_id is whose run it is.
CREATE TABLE dispatcher.approvals (
    approval_id  uuid PRIMARY KEY,
    run_id       uuid NOT NULL,
    user_id      uuid NOT NULL,
    thread_id    uuid NOT NULL,
    step_key     text NOT NULL,
    message      text NOT NULL,
    tool_name    text NOT NULL,
    parameters   jsonb NOT NULL,
    quorum       integer NOT NULL CHECK (quorum > 0),
    outcome      text CHECK (outcome IN ('approved', 'rejected', 'expired')),
    created_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    expires_at   timestamptz NOT NULL,
    resolved_at  timestamptz
);
COMMENT ON COLUMN dispatcher.approvals.outcome IS 'Null while it is pending.';
CREATE INDEX approvals_of_user ON dispatcher.approvals (user_id, created_at DESC, approval_id DESC);
CREATE INDEX approvals_of_thread ON dispatcher.approvals (thread_id, created_at DESC, approval_id DESC);
CREATE INDEX approvals_of_run ON dispatcher.approvals (run_id);
ALTER TABLE dispatcher.approvals ENABLE ROW LEVEL SECURITY;
ALTER TABLE dispatcher.approvals FORCE ROW LEVEL SECURITY;
CREATE POLICY own ON dispatcher.approvals TO netra_dispatcher
    USING (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid)
    WITH CHECK (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid);
CREATE POLICY of_thread ON dispatcher.approvals FOR SELECT TO netra_dispatcher
    USING (thread_id = NULLIF(current_setting('netra.thread_id', true), '')::uuid);
CREATE POLICY of_written_thread ON dispatcher.approvals FOR UPDATE TO netra_dispatcher
    USING (thread_id = NULLIF(current_setting('netra.written_thread_id', true), '')::uuid)
    WITH CHECK (thread_id = NULLIF(current_setting('netra.written_thread_id', true), '')::uuid);
CREATE POLICY system ON dispatcher.approvals TO netra_dispatcher_system USING (true) WITH CHECK (true);
GRANT SELECT, UPDATE (outcome, resolved_at) ON dispatcher.approvals TO netra_dispatcher;
GRANT SELECT, INSERT, UPDATE (outcome, resolved_at) ON dispatcher.approvals TO netra_dispatcher_system;

-- One vote of each user. owner_id is whose run it is about, user_id who voted.
CREATE TABLE dispatcher.approval_votes (
    approval_id  uuid NOT NULL,
    user_id      uuid NOT NULL,
    owner_id     uuid NOT NULL,
    thread_id    uuid NOT NULL,
    decision     text NOT NULL CHECK (decision IN ('approve', 'reject')),
    comment      text NOT NULL,
    at           timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (approval_id, user_id)
);
ALTER TABLE dispatcher.approval_votes ENABLE ROW LEVEL SECURITY;
ALTER TABLE dispatcher.approval_votes FORCE ROW LEVEL SECURITY;
CREATE POLICY own ON dispatcher.approval_votes FOR SELECT TO netra_dispatcher
    USING (NULLIF(current_setting('netra.user_id', true), '')::uuid IN (user_id, owner_id));
CREATE POLICY of_thread ON dispatcher.approval_votes FOR SELECT TO netra_dispatcher
    USING (thread_id = NULLIF(current_setting('netra.thread_id', true), '')::uuid);
CREATE POLICY vote ON dispatcher.approval_votes FOR INSERT TO netra_dispatcher
    WITH CHECK (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid
        AND (owner_id = user_id OR thread_id = NULLIF(current_setting('netra.written_thread_id', true), '')::uuid)
        AND EXISTS (SELECT FROM dispatcher.approvals AS a WHERE a.approval_id = approval_votes.approval_id
            AND a.user_id = approval_votes.owner_id AND a.thread_id = approval_votes.thread_id));
CREATE POLICY system ON dispatcher.approval_votes TO netra_dispatcher_system USING (true) WITH CHECK (true);
GRANT SELECT, INSERT (approval_id, user_id, owner_id, thread_id, decision, comment) ON dispatcher.approval_votes TO netra_dispatcher;
GRANT SELECT ON dispatcher.approval_votes TO netra_dispatcher_system;
