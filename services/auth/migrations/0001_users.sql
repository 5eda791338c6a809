-- Users, sessions, keys, revocations, audit.

CREATE TABLE auth.users (
    user_id       uuid PRIMARY KEY,
    tenant_id     uuid NOT NULL,
    email         text NOT NULL CHECK (email = lower(email) AND length(email) <= 254),
    roles         text[] NOT NULL CHECK (cardinality(roles) > 0 AND roles <@ ARRAY['admin', 'user', 'readonly']),
    tier          text NOT NULL CHECK (tier IN ('free', 'early', 'business', 'enterprise', 'internal')),
    version       int NOT NULL DEFAULT 1,
    password_hash text,
    created_at    timestamptz NOT NULL DEFAULT now(),
    disabled_at   timestamptz,
    CONSTRAINT users_email_unique UNIQUE (email)
);
COMMENT ON COLUMN auth.users.version IS 'Counts up with every change of roles or tier; the claim ver of access tokens.';
COMMENT ON COLUMN auth.users.password_hash IS 'argon2id with its parameters; null for users who sign in otherwise.';

CREATE TABLE auth.sessions (
    session_id   uuid PRIMARY KEY,
    user_id      uuid NOT NULL REFERENCES auth.users ON DELETE CASCADE,
    device       text NOT NULL DEFAULT '',
    created_at   timestamptz NOT NULL DEFAULT now(),
    last_used_at timestamptz NOT NULL DEFAULT now(),
    expires_at   timestamptz NOT NULL,
    ended_at     timestamptz,
    end_reason   text
);
CREATE INDEX sessions_user ON auth.sessions (user_id);

-- A session and its refresh tokens are one family: each token is used once and has one child.
CREATE TABLE auth.refresh_tokens (
    token_digest bytea PRIMARY KEY CHECK (length(token_digest) = 32),
    session_id   uuid NOT NULL REFERENCES auth.sessions ON DELETE CASCADE,
    user_id      uuid NOT NULL REFERENCES auth.users ON DELETE CASCADE,
    created_at   timestamptz NOT NULL DEFAULT now(),
    expires_at   timestamptz NOT NULL,
    used_at      timestamptz
);
CREATE INDEX refresh_tokens_session ON auth.refresh_tokens (session_id);
CREATE INDEX refresh_tokens_user ON auth.refresh_tokens (user_id);
CREATE INDEX refresh_tokens_expiry ON auth.refresh_tokens (expires_at);

-- No user in here: every process may know which sessions have ended, not whose they were.
CREATE TABLE auth.revocations (
    session_id uuid PRIMARY KEY,
    revoked_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX revocations_time ON auth.revocations (revoked_at);

CREATE TABLE auth.signing_keys (
    kid          text PRIMARY KEY,
    state        text NOT NULL CHECK (state IN ('next', 'current', 'retired')),
    public_key   bytea NOT NULL CHECK (length(public_key) = 32),
    wrapped      bytea,
    created_at   timestamptz NOT NULL DEFAULT now(),
    activated_at timestamptz,
    retired_at   timestamptz,
    CHECK ((wrapped IS NULL) = (state = 'retired') AND (retired_at IS NOT NULL) = (state = 'retired'))
);
CREATE UNIQUE INDEX signing_keys_one_each ON auth.signing_keys (state) WHERE state <> 'retired';

CREATE TABLE auth.published_keys (
    issuer       text NOT NULL CHECK (issuer <> 'auth'),
    kid          text NOT NULL,
    public_key   bytea NOT NULL CHECK (length(public_key) = 32),
    published_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (issuer, kid)
);

-- Append-only: no role may update or delete; no reference to users, because it outlives them.
CREATE TABLE auth.audit (
    audit_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at       timestamptz NOT NULL DEFAULT now(),
    user_id  uuid,
    actor    text NOT NULL,
    action   text NOT NULL,
    outcome  text NOT NULL,
    detail   text NOT NULL DEFAULT ''
);
CREATE INDEX audit_user ON auth.audit (user_id, audit_id);

ALTER TABLE auth.users ENABLE ROW LEVEL SECURITY;
ALTER TABLE auth.users FORCE ROW LEVEL SECURITY;
ALTER TABLE auth.sessions ENABLE ROW LEVEL SECURITY;
ALTER TABLE auth.sessions FORCE ROW LEVEL SECURITY;
ALTER TABLE auth.refresh_tokens ENABLE ROW LEVEL SECURITY;
ALTER TABLE auth.refresh_tokens FORCE ROW LEVEL SECURITY;
ALTER TABLE auth.audit ENABLE ROW LEVEL SECURITY;
ALTER TABLE auth.audit FORCE ROW LEVEL SECURITY;

CREATE POLICY own ON auth.users TO netra_auth
    USING (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid)
    WITH CHECK (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid);
CREATE POLICY own ON auth.sessions TO netra_auth
    USING (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid)
    WITH CHECK (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid);
CREATE POLICY own ON auth.refresh_tokens TO netra_auth
    USING (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid)
    WITH CHECK (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid);
CREATE POLICY own ON auth.audit FOR INSERT TO netra_auth
    WITH CHECK (user_id IS NOT DISTINCT FROM NULLIF(current_setting('netra.user_id', true), '')::uuid);

CREATE POLICY every ON auth.users TO netra_auth_system USING (true);
CREATE POLICY every ON auth.sessions TO netra_auth_system USING (true);
CREATE POLICY every ON auth.refresh_tokens TO netra_auth_system USING (true);
CREATE POLICY every ON auth.audit FOR INSERT TO netra_auth_system WITH CHECK (true);

GRANT USAGE ON SCHEMA auth TO netra_auth, netra_auth_system;
GRANT SELECT ON auth.migrations TO netra_auth, netra_auth_system;

GRANT SELECT, INSERT ON auth.users, auth.sessions TO netra_auth;
GRANT UPDATE (password_hash) ON auth.users TO netra_auth;
GRANT UPDATE (ended_at, end_reason) ON auth.sessions TO netra_auth;
GRANT INSERT ON auth.refresh_tokens TO netra_auth;
GRANT SELECT, INSERT ON auth.revocations TO netra_auth;
GRANT SELECT, INSERT ON auth.signing_keys TO netra_auth;
GRANT UPDATE (state, wrapped, activated_at, retired_at) ON auth.signing_keys TO netra_auth;
GRANT SELECT, INSERT ON auth.published_keys TO netra_auth;
GRANT INSERT (user_id, actor, action, outcome, detail) ON auth.audit TO netra_auth, netra_auth_system;

GRANT SELECT (user_id, tenant_id, email, roles, tier, version, password_hash, disabled_at) ON auth.users TO netra_auth_system;
GRANT SELECT (session_id, user_id, expires_at, ended_at), UPDATE (last_used_at) ON auth.sessions TO netra_auth_system;
GRANT SELECT (token_digest, session_id, user_id, expires_at, used_at) ON auth.refresh_tokens TO netra_auth_system;
GRANT INSERT (token_digest, session_id, user_id, expires_at), UPDATE (used_at), DELETE ON auth.refresh_tokens TO netra_auth_system;
GRANT SELECT, DELETE ON auth.revocations TO netra_auth_system;
