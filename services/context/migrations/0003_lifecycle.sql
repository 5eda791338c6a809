-- Contexts end: when their token was not renewed, when their session or user is withdrawn, when they were closed long ago.

ALTER TABLE context.contexts
    -- the permissions it is narrowed to; empty when it is not
    ADD COLUMN scope text[] NOT NULL DEFAULT '{}',
    -- when its last token ends: nobody goes on with it after that
    ADD COLUMN token_until timestamptz NOT NULL DEFAULT clock_timestamp() + interval '1 hour';

-- ids are UUIDv7 made here: their order is the order of creation
CREATE INDEX contexts_of_user ON context.contexts (user_id, context_id DESC);
CREATE INDEX contexts_of_thread ON context.contexts (thread_id, context_id DESC);
CREATE INDEX contexts_of_run ON context.contexts (user_id, run_id, context_id DESC);
CREATE INDEX contexts_open ON context.contexts (token_until) WHERE closed_at IS NULL;
CREATE INDEX contexts_open_of_user ON context.contexts (user_id) WHERE closed_at IS NULL;
CREATE INDEX contexts_open_of_session ON context.contexts (session_id) WHERE closed_at IS NULL;
CREATE INDEX contexts_closed ON context.contexts (closed_at) WHERE closed_at IS NOT NULL;

ALTER TABLE context.audit
    -- a line may be about a thread, or about all of a user's data
    ALTER COLUMN context_id DROP NOT NULL,
    ADD COLUMN thread_id uuid,
    DROP CONSTRAINT audit_action_check,
    ADD CONSTRAINT audit_action_check CHECK (action IN
        ('open', 'derive', 'close', 'expire', 'revoke', 'read', 'grant', 'withdraw', 'delete', 'restore', 'erase', 'export'));
CREATE INDEX audit_of_user ON context.audit (user_id, id);
CREATE INDEX audit_of_thread ON context.audit (user_id, thread_id, id) WHERE thread_id IS NOT NULL;

-- Who sweeps and withdraws crosses users: it sees when contexts end, and whose they are; of admins it reads whole rows of one user, audited.
CREATE POLICY system ON context.contexts TO netra_context_system USING (true) WITH CHECK (true);
CREATE POLICY system ON context.audit TO netra_context_system USING (true) WITH CHECK (true);

GRANT UPDATE (token_until) ON context.contexts TO netra_context;
GRANT SELECT, UPDATE (closed_at), DELETE ON context.contexts TO netra_context_system;
GRANT SELECT, INSERT ON context.audit TO netra_context_system;
-- of whom an admin of a tenant may read: a user is of the tenant that their threads are of, whatever became of their contexts
CREATE POLICY of_tenant ON context.threads FOR SELECT TO netra_context_system USING (true);
GRANT SELECT (user_id, tenant_id) ON context.threads TO netra_context_system;
