-- Files of users, in chunks of 1 MiB.

CREATE TABLE context.artifacts (
    artifact_id uuid PRIMARY KEY,
    user_id     uuid NOT NULL,
    request_id  text NOT NULL,
    -- discarded ones are removed a few chunks at a time: they are too large for one statement
    state       text NOT NULL CHECK (state IN ('uploading', 'complete', 'discarded')),
    name        text NOT NULL CHECK (char_length(name) BETWEEN 1 AND 255),
    media_type  text NOT NULL,
    -- what counts against the user's limit, from before the bytes come
    reserved    bigint NOT NULL CHECK (reserved >= 0),
    size        bigint CHECK (size >= 0),
    sha256      bytea CHECK (octet_length(sha256) = 32),
    run_id      uuid,
    created_at  timestamptz NOT NULL DEFAULT now(),
    -- when something last came
    touched_at  timestamptz NOT NULL DEFAULT now(),
    CHECK (state <> 'complete' OR (size IS NOT NULL AND sha256 IS NOT NULL AND reserved = size))
);
-- a request id is taken by what was complete: an upload that broke may be sent again
CREATE UNIQUE INDEX artifacts_request ON context.artifacts (user_id, request_id) WHERE state = 'complete';
-- ids are UUIDv7 made here: their order is the order of creation
CREATE INDEX artifacts_of_user ON context.artifacts (user_id, artifact_id DESC);
CREATE INDEX artifacts_left_over ON context.artifacts (state, touched_at) WHERE state <> 'complete';

CREATE TABLE context.artifact_chunks (
    artifact_id uuid NOT NULL REFERENCES context.artifacts,
    -- all but the last have 1 MiB: an offset tells the position
    position    int NOT NULL CHECK (position >= 0),
    user_id     uuid NOT NULL,
    data        bytea NOT NULL CHECK (octet_length(data) BETWEEN 1 AND 1048576),
    PRIMARY KEY (artifact_id, position)
);
-- files are often compressed already, and trying costs more than it gives
ALTER TABLE context.artifact_chunks ALTER COLUMN data SET STORAGE EXTERNAL;

ALTER TABLE context.artifacts ENABLE ROW LEVEL SECURITY;
ALTER TABLE context.artifacts FORCE ROW LEVEL SECURITY;
ALTER TABLE context.artifact_chunks ENABLE ROW LEVEL SECURITY;
ALTER TABLE context.artifact_chunks FORCE ROW LEVEL SECURITY;

CREATE POLICY own ON context.artifacts TO netra_context
    USING (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid)
    WITH CHECK (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid);
CREATE POLICY own ON context.artifact_chunks TO netra_context
    USING (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid)
    WITH CHECK (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid);
-- who removes what is left over sees no file that anybody has
CREATE POLICY left_over ON context.artifacts TO netra_context_system
    USING (state <> 'complete') WITH CHECK (state <> 'complete');
CREATE POLICY left_over ON context.artifact_chunks TO netra_context_system
    USING (EXISTS (SELECT FROM context.artifacts AS owner WHERE owner.artifact_id = artifact_chunks.artifact_id AND owner.state <> 'complete'));

GRANT SELECT, INSERT, UPDATE (state, reserved, size, sha256, created_at, touched_at) ON context.artifacts TO netra_context;
GRANT SELECT, INSERT ON context.artifact_chunks TO netra_context;
GRANT SELECT (artifact_id, state, touched_at), UPDATE (state), DELETE ON context.artifacts TO netra_context_system;
GRANT SELECT (artifact_id, position), DELETE ON context.artifact_chunks TO netra_context_system;
