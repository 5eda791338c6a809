-- Devices, API keys, outside sign-in, policy; revocations of users; the record of access becomes a chain of hashes.

-- ---------------------------------------------------------------- users and sessions

CREATE INDEX users_of_tenant ON auth.users (tenant_id, user_id DESC);

ALTER TABLE auth.sessions
    ADD COLUMN method     text NOT NULL DEFAULT 'password' CHECK (method ~ '^(password|api_key|oidc:.+)$'),
    ADD COLUMN address    text NOT NULL DEFAULT '' CHECK (length(address) <= 64),
    ADD COLUMN idle       interval NOT NULL DEFAULT interval '8 hours',
    ADD COLUMN idle_until timestamptz;
-- the owner is under the wall as well, and would see no row
ALTER TABLE auth.sessions NO FORCE ROW LEVEL SECURITY;
UPDATE auth.sessions SET idle_until = least(last_used_at + idle, expires_at);
ALTER TABLE auth.sessions FORCE ROW LEVEL SECURITY;
ALTER TABLE auth.sessions ALTER COLUMN idle_until SET NOT NULL;
COMMENT ON COLUMN auth.sessions.idle IS 'How long the session may lie unused; each use sets idle_until anew.';
DROP INDEX auth.sessions_user;
CREATE INDEX sessions_user ON auth.sessions (user_id, last_used_at DESC) WHERE ended_at IS NULL;
CREATE INDEX sessions_over ON auth.sessions (least(expires_at, ended_at));

-- The sign-in of a user on this device, from this address, has succeeded: it has a budget of attempts of its own.
CREATE TABLE auth.known_devices (
    user_id       uuid NOT NULL REFERENCES auth.users ON DELETE CASCADE,
    device_digest bytea NOT NULL CHECK (length(device_digest) = 32),
    last_used_at  timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (user_id, device_digest)
);
CREATE INDEX known_devices_age ON auth.known_devices (last_used_at);

-- Deleted by who uses it, or has a newer one.
CREATE TABLE auth.reset_tokens (
    token_digest bytea PRIMARY KEY CHECK (length(token_digest) = 32),
    user_id      uuid NOT NULL REFERENCES auth.users ON DELETE CASCADE,
    created_by   uuid REFERENCES auth.users ON DELETE CASCADE,
    created_at   timestamptz NOT NULL DEFAULT now(),
    expires_at   timestamptz NOT NULL
);
COMMENT ON COLUMN auth.reset_tokens.created_by IS 'The administrator who vouches for it; it is worth no more than they are by then.';
CREATE INDEX reset_tokens_user ON auth.reset_tokens (user_id);
CREATE INDEX reset_tokens_expiry ON auth.reset_tokens (expires_at);

-- ---------------------------------------------------------------- API keys and outside sign-in

-- A key owns a session (method api_key, without refresh tokens): it is in force while that session lives.
CREATE TABLE auth.api_keys (
    key_id        uuid PRIMARY KEY,
    user_id       uuid NOT NULL REFERENCES auth.users ON DELETE CASCADE,
    session_id    uuid NOT NULL UNIQUE REFERENCES auth.sessions ON DELETE CASCADE,
    name          text NOT NULL CHECK (length(name) BETWEEN 1 AND 100),
    prefix        text NOT NULL CHECK (length(prefix) <= 16),
    secret_digest bytea NOT NULL UNIQUE CHECK (length(secret_digest) = 32),
    scopes        text[] NOT NULL CHECK (cardinality(scopes) > 0),
    created_at    timestamptz NOT NULL DEFAULT now(),
    expires_at    timestamptz NOT NULL,
    last_used_at  timestamptz
);
CREATE INDEX api_keys_user ON auth.api_keys (user_id, key_id DESC);

-- Whom an outside provider means.
CREATE TABLE auth.identities (
    provider     text NOT NULL CHECK (length(provider) BETWEEN 1 AND 64),
    subject      text NOT NULL CHECK (length(subject) BETWEEN 1 AND 255),
    user_id      uuid NOT NULL REFERENCES auth.users ON DELETE CASCADE,
    email        text NOT NULL DEFAULT '' CHECK (length(email) <= 254),
    created_at   timestamptz NOT NULL DEFAULT now(),
    last_used_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (provider, subject)
);
CREATE INDEX identities_user ON auth.identities (user_id);

-- A sign-in that is under way; nobody is known yet. Deleted by who uses it.
CREATE TABLE auth.oidc_attempts (
    state_digest   bytea PRIMARY KEY CHECK (length(state_digest) = 32),
    binding_digest bytea NOT NULL CHECK (length(binding_digest) = 32),
    provider       text NOT NULL,
    nonce          text NOT NULL,
    code_verifier  text NOT NULL,
    redirect_uri   text NOT NULL DEFAULT '',
    code_challenge bytea CHECK (length(code_challenge) = 32),
    callback_uri   text NOT NULL,
    created_at     timestamptz NOT NULL DEFAULT now(),
    expires_at     timestamptz NOT NULL
);
CREATE INDEX oidc_attempts_expiry ON auth.oidc_attempts (expires_at);

CREATE TABLE auth.login_codes (
    code_digest bytea PRIMARY KEY CHECK (length(code_digest) = 32),
    bound_to    bytea NOT NULL CHECK (length(bound_to) = 32),
    user_id     uuid NOT NULL REFERENCES auth.users ON DELETE CASCADE,
    method      text NOT NULL,
    device      text NOT NULL DEFAULT '',
    created_at  timestamptz NOT NULL DEFAULT now(),
    expires_at  timestamptz NOT NULL,
    used_at     timestamptz
);
COMMENT ON COLUMN auth.login_codes.bound_to IS 'SHA-256 of what whoever redeems it must have: the code verifier, or the browser''s binding.';
CREATE INDEX login_codes_user ON auth.login_codes (user_id);
CREATE INDEX login_codes_expiry ON auth.login_codes (expires_at);

-- ---------------------------------------------------------------- policy

CREATE TABLE auth.policies (
    version    bigint PRIMARY KEY CHECK (version > 0),
    document   bytea NOT NULL,
    actor      text NOT NULL,
    comment    text NOT NULL DEFAULT '' CHECK (length(comment) <= 600),
    defaults   int NOT NULL DEFAULT 0,
    created_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON COLUMN auth.policies.document IS 'netra.auth.v1.Policy; the highest version is in force.';
COMMENT ON COLUMN auth.policies.defaults IS 'Which state of the tables that come with the code this is; 0 when a person made it.';

-- ---------------------------------------------------------------- revocations

-- One session, or all tokens of a user that were issued before. Processes are told no more than this.
ALTER TABLE auth.revocations DROP CONSTRAINT revocations_pkey;
ALTER TABLE auth.revocations
    ALTER COLUMN session_id DROP NOT NULL,
    ADD COLUMN revocation_id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    ADD COLUMN user_id uuid,
    ADD COLUMN security boolean NOT NULL DEFAULT false,
    ADD CHECK ((session_id IS NULL) <> (user_id IS NULL));

-- ---------------------------------------------------------------- the record of access, a chain

CREATE TABLE auth.audit_head (
    one_row  boolean PRIMARY KEY DEFAULT true CHECK (one_row),
    position bigint NOT NULL,
    hash     bytea NOT NULL CHECK (length(hash) = 32)
);
COMMENT ON TABLE auth.audit_head IS 'The last entry of auth.audit. Its one row is locked while an entry is added, so positions have no gaps.';
INSERT INTO auth.audit_head (position, hash) VALUES (0, sha256('netra audit'::bytea));

DROP POLICY own ON auth.audit;
DROP POLICY every ON auth.audit;
DROP INDEX auth.audit_user;
REVOKE INSERT (user_id, actor, action, outcome, detail) ON auth.audit FROM netra_auth, netra_auth_system;
ALTER TABLE auth.audit RENAME COLUMN audit_id TO position;
ALTER TABLE auth.audit ALTER COLUMN position DROP IDENTITY;
ALTER TABLE auth.audit
    ADD COLUMN tenant_id      uuid,
    ADD COLUMN correlation_id text NOT NULL DEFAULT '',
    ADD COLUMN hash           bytea CHECK (length(hash) = 32);

-- What an entry adds to the hash before it: each field as text, after its length in bytes (four bytes, the highest first).
-- An absent id is the empty text; the time is microseconds since 1970.
CREATE FUNCTION auth.audit_hash(
    before bytea, at_position bigint, at timestamptz, tenant uuid, about uuid, actor text, action text, outcome text, detail text,
    correlation text
) RETURNS bytea LANGUAGE sql IMMUTABLE PARALLEL SAFE SET search_path = pg_catalog, pg_temp AS $$
    SELECT sha256(before || string_agg(int4send(octet_length(field)) || convert_to(field, 'UTF8'), ''::bytea ORDER BY place))
    FROM unnest(ARRAY[
        at_position::text, (extract(epoch FROM at) * 1000000)::bigint::text, coalesce(tenant::text, ''), coalesce(about::text, ''),
        actor, action, outcome, detail, correlation
    ]) WITH ORDINALITY AS fields (field, place)
$$;

-- The only way to write the record. Called last in a transaction: from here to its end no other entry can be added.
CREATE FUNCTION auth.append_audit(
    tenant uuid, about uuid, actor text, action text, outcome text, detail text, correlation text
) RETURNS bigint LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    last_position bigint;
    last_hash bytea;
    new_hash bytea;
    written_at timestamptz;
    of_tenant uuid := coalesce(tenant, (SELECT u.tenant_id FROM auth.users AS u WHERE u.user_id = about));
BEGIN
    SELECT h.position, h.hash INTO STRICT last_position, last_hash FROM auth.audit_head AS h FOR UPDATE;
    written_at := clock_timestamp();
    new_hash := auth.audit_hash(
        last_hash, last_position + 1, written_at, of_tenant, about, actor, action, outcome, detail, correlation);
    INSERT INTO auth.audit (position, at, tenant_id, user_id, actor, action, outcome, detail, correlation_id, hash)
    VALUES (last_position + 1, written_at, of_tenant, about, actor, action, outcome, detail, correlation, new_hash);
    UPDATE auth.audit_head SET position = last_position + 1, hash = new_hash;
    RETURN last_position + 1;
END
$$;

-- The function's owner is subject to forced row-level security like everybody else.
CREATE POLICY chain ON auth.audit TO CURRENT_USER USING (true) WITH CHECK (true);
CREATE POLICY chain ON auth.users FOR SELECT TO CURRENT_USER USING (true);

-- Entries of earlier versions join the chain, in their order.
DO $$
DECLARE
    entry record;
    last_position bigint := 0;
    last_hash bytea := (SELECT h.hash FROM auth.audit_head AS h);
    of_tenant uuid;
BEGIN
    FOR entry IN SELECT a.position, a.at, a.user_id, a.actor, a.action, a.outcome, a.detail FROM auth.audit AS a ORDER BY a.position LOOP
        last_position := last_position + 1;
        of_tenant := (SELECT u.tenant_id FROM auth.users AS u WHERE u.user_id = entry.user_id);
        last_hash := auth.audit_hash(
            last_hash, last_position, entry.at, of_tenant, entry.user_id, entry.actor, entry.action, entry.outcome, entry.detail, '');
        -- positions had gaps, never the other way round: a number that is wanted is free by now
        UPDATE auth.audit SET position = last_position, tenant_id = of_tenant, hash = last_hash WHERE position = entry.position;
    END LOOP;
    UPDATE auth.audit_head SET position = last_position, hash = last_hash;
END
$$;
ALTER TABLE auth.audit ALTER COLUMN hash SET NOT NULL;
CREATE INDEX audit_of_tenant ON auth.audit (tenant_id, position DESC);
CREATE INDEX audit_of_user ON auth.audit (user_id, position DESC);

-- ---------------------------------------------------------------- walls

ALTER TABLE auth.known_devices ENABLE ROW LEVEL SECURITY;
ALTER TABLE auth.known_devices FORCE ROW LEVEL SECURITY;
ALTER TABLE auth.reset_tokens ENABLE ROW LEVEL SECURITY;
ALTER TABLE auth.reset_tokens FORCE ROW LEVEL SECURITY;
ALTER TABLE auth.api_keys ENABLE ROW LEVEL SECURITY;
ALTER TABLE auth.api_keys FORCE ROW LEVEL SECURITY;
ALTER TABLE auth.identities ENABLE ROW LEVEL SECURITY;
ALTER TABLE auth.identities FORCE ROW LEVEL SECURITY;
ALTER TABLE auth.login_codes ENABLE ROW LEVEL SECURITY;
ALTER TABLE auth.login_codes FORCE ROW LEVEL SECURITY;
ALTER TABLE auth.revocations ENABLE ROW LEVEL SECURITY;
ALTER TABLE auth.revocations FORCE ROW LEVEL SECURITY;

CREATE POLICY own ON auth.known_devices TO netra_auth
    USING (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid)
    WITH CHECK (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid);
CREATE POLICY own ON auth.reset_tokens TO netra_auth
    USING (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid)
    WITH CHECK (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid);
CREATE POLICY own ON auth.api_keys TO netra_auth
    USING (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid)
    WITH CHECK (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid);
CREATE POLICY own ON auth.identities TO netra_auth
    USING (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid)
    WITH CHECK (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid);
CREATE POLICY own ON auth.login_codes TO netra_auth
    USING (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid)
    WITH CHECK (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid);
CREATE POLICY own ON auth.revocations FOR INSERT TO netra_auth
    WITH CHECK (user_id IS NULL OR user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid);

CREATE POLICY every ON auth.known_devices TO netra_auth_system USING (true);
CREATE POLICY every ON auth.reset_tokens TO netra_auth_system USING (true);
CREATE POLICY every ON auth.api_keys TO netra_auth_system USING (true);
CREATE POLICY every ON auth.identities TO netra_auth_system USING (true);
CREATE POLICY every ON auth.login_codes TO netra_auth_system USING (true);
CREATE POLICY every ON auth.revocations TO netra_auth_system USING (true);
CREATE POLICY every ON auth.audit FOR SELECT TO netra_auth_system USING (true);

-- ---------------------------------------------------------------- grants

-- as a user: their rows, and an administrator acting on one user of their tenant
GRANT UPDATE (roles, tier, version, disabled_at) ON auth.users TO netra_auth;
GRANT SELECT, INSERT, UPDATE (last_used_at), DELETE ON auth.known_devices TO netra_auth;
GRANT SELECT, INSERT, DELETE ON auth.reset_tokens TO netra_auth;
GRANT SELECT (token_digest, user_id, used_at) ON auth.refresh_tokens TO netra_auth;
GRANT SELECT, INSERT ON auth.api_keys TO netra_auth;
GRANT SELECT, INSERT ON auth.identities TO netra_auth;
GRANT SELECT, DELETE ON auth.login_codes TO netra_auth;
GRANT SELECT, INSERT, DELETE ON auth.oidc_attempts TO netra_auth;
GRANT SELECT, INSERT ON auth.policies TO netra_auth;
REVOKE SELECT ON auth.revocations FROM netra_auth;

-- across users: what somebody signs in with, the lists of administrators, the sweepers
GRANT SELECT (created_at) ON auth.users TO netra_auth_system;
GRANT SELECT (idle, idle_until, address), UPDATE (idle_until, address), DELETE ON auth.sessions TO netra_auth_system;
GRANT SELECT (device_digest, user_id, last_used_at), DELETE ON auth.known_devices TO netra_auth_system;
GRANT SELECT (token_digest, user_id, expires_at), DELETE ON auth.reset_tokens TO netra_auth_system;
GRANT SELECT (key_id, user_id, session_id, secret_digest, scopes, expires_at, last_used_at), UPDATE (last_used_at)
    ON auth.api_keys TO netra_auth_system;
GRANT SELECT, INSERT, UPDATE (email, last_used_at) ON auth.identities TO netra_auth_system;
GRANT SELECT (code_digest, bound_to, user_id, method, device, expires_at, used_at), INSERT, UPDATE (used_at), DELETE
    ON auth.login_codes TO netra_auth_system;
GRANT SELECT, INSERT, DELETE ON auth.oidc_attempts TO netra_auth_system;
GRANT SELECT ON auth.policies TO netra_auth_system;
GRANT SELECT ON auth.audit, auth.audit_head TO netra_auth_system;

REVOKE ALL ON FUNCTION auth.audit_hash, auth.append_audit FROM PUBLIC;
GRANT EXECUTE ON FUNCTION auth.append_audit TO netra_auth, netra_auth_system;
GRANT EXECUTE ON FUNCTION auth.audit_hash TO netra_auth_system;
