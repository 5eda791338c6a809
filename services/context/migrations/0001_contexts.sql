-- Execution contexts, threads, messages, their audit trail, and the key that contexts are signed with.

CREATE TABLE context.threads (
    thread_id  uuid PRIMARY KEY,
    user_id    uuid NOT NULL,
    tenant_id  uuid NOT NULL,
    messages   bigint NOT NULL DEFAULT 0 CHECK (messages >= 0),
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);
-- ids are UUIDv7 made here: their order is the order of creation
CREATE INDEX threads_of_user ON context.threads (user_id, thread_id DESC);

CREATE TABLE context.messages (
    thread_id  uuid NOT NULL REFERENCES context.threads,
    position   bigint NOT NULL CHECK (position > 0),
    message_id uuid NOT NULL UNIQUE,
    user_id    uuid NOT NULL,
    request_id text NOT NULL,
    role       text NOT NULL CHECK (role IN ('user', 'assistant')),
    content    text NOT NULL CHECK (octet_length(content) BETWEEN 1 AND 262144),
    run_id     uuid NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (thread_id, position),
    CONSTRAINT messages_request UNIQUE (user_id, request_id)
);

CREATE TABLE context.contexts (
    context_id        uuid PRIMARY KEY,
    user_id           uuid NOT NULL,
    tenant_id         uuid NOT NULL,
    session_id        uuid NOT NULL,
    thread_id         uuid NOT NULL REFERENCES context.threads,
    run_id            uuid NOT NULL,
    request_id        text NOT NULL,
    connection_id     uuid,
    roles             text[] NOT NULL,
    tier              text NOT NULL,
    created_at        timestamptz NOT NULL,
    deadline          timestamptz,
    depth             int NOT NULL CHECK (depth BETWEEN 0 AND 10),
    parent_request_id text,
    correlation_id    text NOT NULL,
    -- canonical JSON; bytes, because what was signed must come back as it was
    agent_context     bytea NOT NULL,
    audit_metadata    bytea NOT NULL,
    -- what was asked under the request id
    asked             bytea NOT NULL,
    closed_at         timestamptz,
    CONSTRAINT contexts_request UNIQUE (user_id, request_id)
);

CREATE TABLE context.audit (
    id             bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at             timestamptz NOT NULL DEFAULT now(),
    user_id        uuid NOT NULL,
    context_id     uuid NOT NULL,
    actor          text NOT NULL,
    action         text NOT NULL CHECK (action IN ('open', 'derive', 'close')),
    correlation_id text NOT NULL,
    detail         jsonb NOT NULL
);
CREATE INDEX audit_of_context ON context.audit (user_id, context_id, id);

CREATE TABLE context.signing_keys (
    kid        text PRIMARY KEY,
    state      text NOT NULL CHECK (state IN ('current', 'retired')),
    sealed     bytea NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE UNIQUE INDEX one_current_key ON context.signing_keys (state) WHERE state = 'current';

ALTER TABLE context.threads ENABLE ROW LEVEL SECURITY;
ALTER TABLE context.threads FORCE ROW LEVEL SECURITY;
ALTER TABLE context.messages ENABLE ROW LEVEL SECURITY;
ALTER TABLE context.messages FORCE ROW LEVEL SECURITY;
ALTER TABLE context.contexts ENABLE ROW LEVEL SECURITY;
ALTER TABLE context.contexts FORCE ROW LEVEL SECURITY;
ALTER TABLE context.audit ENABLE ROW LEVEL SECURITY;
ALTER TABLE context.audit FORCE ROW LEVEL SECURITY;

CREATE POLICY own ON context.threads TO netra_context
    USING (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid)
    WITH CHECK (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid);
CREATE POLICY own ON context.messages TO netra_context
    USING (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid)
    WITH CHECK (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid);
CREATE POLICY own ON context.contexts TO netra_context
    USING (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid)
    WITH CHECK (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid);
CREATE POLICY own ON context.audit TO netra_context
    USING (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid)
    WITH CHECK (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid);

GRANT USAGE ON SCHEMA context TO netra_context, netra_context_system;
GRANT SELECT ON context.migrations TO netra_context, netra_context_system;
GRANT SELECT, INSERT, UPDATE (messages, updated_at) ON context.threads TO netra_context;
GRANT SELECT, INSERT ON context.messages TO netra_context;
GRANT SELECT, INSERT, UPDATE (closed_at) ON context.contexts TO netra_context;
GRANT SELECT, INSERT ON context.audit TO netra_context;
GRANT SELECT, INSERT ON context.signing_keys TO netra_context_system;
