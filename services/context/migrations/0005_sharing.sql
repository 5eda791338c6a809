-- Grants: the owner of a thread lets others of the tenant read it or write to it. What of a thread is whose is said by `owner_id` (whose
-- thread it is) beside `user_id` (whose doing it is). Policies of grants look at no other table: those of the others may look at grants.

CREATE TABLE context.grants (
    thread_id    uuid NOT NULL,
    owner_id     uuid NOT NULL,
    tenant_id    uuid NOT NULL,
    grantee_id   uuid NOT NULL,
    access       text NOT NULL CHECK (access IN ('read', 'write')),
    request_id   text NOT NULL,
    created_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    withdrawn_at timestamptz,
    PRIMARY KEY (thread_id, grantee_id),
    CHECK (owner_id <> grantee_id),
    -- nobody grants what is not theirs, whatever the code does
    CONSTRAINT grants_owner FOREIGN KEY (thread_id, owner_id) REFERENCES context.threads (thread_id, user_id)
);
CREATE INDEX grants_received ON context.grants (grantee_id, thread_id DESC) WHERE withdrawn_at IS NULL;
CREATE INDEX grants_given ON context.grants (owner_id, thread_id);

ALTER TABLE context.grants ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
CREATE POLICY own ON context.grants TO netra_context
    USING (owner_id = NULLIF(current_setting('netra.user_id', true), '')::uuid)
    WITH CHECK (owner_id = NULLIF(current_setting('netra.user_id', true), '')::uuid);
CREATE POLICY received ON context.grants FOR SELECT TO netra_context
    USING (grantee_id = NULLIF(current_setting('netra.user_id', true), '')::uuid AND withdrawn_at IS NULL);

-- ---------------------------------------------------------------- whose thread it is

-- the owner is under the wall as well
ALTER TABLE context.messages NO FORCE ROW LEVEL SECURITY;
ALTER TABLE context.contexts NO FORCE ROW LEVEL SECURITY;
ALTER TABLE context.messages ADD COLUMN owner_id uuid;
ALTER TABLE context.contexts ADD COLUMN owner_id uuid;
UPDATE context.messages SET owner_id = user_id;
UPDATE context.contexts SET owner_id = user_id;
ALTER TABLE context.messages ALTER COLUMN owner_id SET NOT NULL,
    ADD CONSTRAINT messages_thread FOREIGN KEY (thread_id, owner_id) REFERENCES context.threads (thread_id, user_id);
ALTER TABLE context.contexts ALTER COLUMN owner_id SET NOT NULL,
    ADD CONSTRAINT contexts_thread FOREIGN KEY (thread_id, owner_id) REFERENCES context.threads (thread_id, user_id);
ALTER TABLE context.messages FORCE ROW LEVEL SECURITY;
ALTER TABLE context.contexts FORCE ROW LEVEL SECURITY;

-- ---------------------------------------------------------------- walls

-- A granted thread is seen while its owner has it, counted by whoever writes to it, and deleted by nobody else.
CREATE POLICY granted ON context.threads FOR SELECT TO netra_context
    USING (deleted_at IS NULL AND erased_at IS NULL AND thread_id IN (
        SELECT g.thread_id FROM context.grants AS g
        WHERE g.grantee_id = NULLIF(current_setting('netra.user_id', true), '')::uuid AND g.withdrawn_at IS NULL));
CREATE POLICY granted_write ON context.threads FOR UPDATE TO netra_context
    USING (deleted_at IS NULL AND erased_at IS NULL AND thread_id IN (
        SELECT g.thread_id FROM context.grants AS g
        WHERE g.grantee_id = NULLIF(current_setting('netra.user_id', true), '')::uuid AND g.access = 'write' AND g.withdrawn_at IS NULL))
    WITH CHECK (deleted_at IS NULL AND erased_at IS NULL);

-- Messages, contexts, files: seen by whose doing they are, by the owner of the thread, and (messages and files) by whom it is granted
-- to. Made by oneself only, in a thread of one's own or one granted for writing.
DROP POLICY own ON context.messages;
CREATE POLICY seen ON context.messages FOR SELECT TO netra_context
    USING (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid
        OR owner_id = NULLIF(current_setting('netra.user_id', true), '')::uuid
        OR thread_id IN (
            SELECT g.thread_id FROM context.grants AS g
            WHERE g.grantee_id = NULLIF(current_setting('netra.user_id', true), '')::uuid AND g.withdrawn_at IS NULL));
CREATE POLICY made ON context.messages FOR INSERT TO netra_context
    WITH CHECK (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid
        AND (owner_id = user_id OR thread_id IN (
            SELECT g.thread_id FROM context.grants AS g
            WHERE g.grantee_id = NULLIF(current_setting('netra.user_id', true), '')::uuid AND g.access = 'write' AND g.withdrawn_at IS NULL)));
CREATE POLICY erased ON context.messages FOR DELETE TO netra_context
    USING (owner_id = NULLIF(current_setting('netra.user_id', true), '')::uuid
        OR user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid);

DROP POLICY own ON context.contexts;
CREATE POLICY seen ON context.contexts FOR SELECT TO netra_context
    USING (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid);
CREATE POLICY made ON context.contexts FOR INSERT TO netra_context
    WITH CHECK (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid
        AND (owner_id = user_id OR thread_id IN (
            SELECT g.thread_id FROM context.grants AS g
            WHERE g.grantee_id = NULLIF(current_setting('netra.user_id', true), '')::uuid AND g.access = 'write' AND g.withdrawn_at IS NULL)));
CREATE POLICY changed ON context.contexts FOR UPDATE TO netra_context
    USING (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid)
    WITH CHECK (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid);
-- whether a run still goes on in a thread that is to be erased; and its contexts then
CREATE POLICY of_thread ON context.contexts FOR SELECT TO netra_context
    USING (owner_id = NULLIF(current_setting('netra.user_id', true), '')::uuid);
CREATE POLICY erased ON context.contexts FOR DELETE TO netra_context
    USING (owner_id = NULLIF(current_setting('netra.user_id', true), '')::uuid
        OR user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid);

DROP POLICY own ON context.artifacts;
CREATE POLICY seen ON context.artifacts FOR SELECT TO netra_context
    USING (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid
        OR owner_id = NULLIF(current_setting('netra.user_id', true), '')::uuid
        OR thread_id IN (
            SELECT g.thread_id FROM context.grants AS g
            WHERE g.grantee_id = NULLIF(current_setting('netra.user_id', true), '')::uuid AND g.withdrawn_at IS NULL));
CREATE POLICY made ON context.artifacts FOR INSERT TO netra_context
    WITH CHECK (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid
        AND (owner_id IS NULL OR owner_id = user_id OR thread_id IN (
            SELECT g.thread_id FROM context.grants AS g
            WHERE g.grantee_id = NULLIF(current_setting('netra.user_id', true), '')::uuid AND g.access = 'write' AND g.withdrawn_at IS NULL)));
CREATE POLICY changed ON context.artifacts FOR UPDATE TO netra_context
    USING (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid
        OR owner_id = NULLIF(current_setting('netra.user_id', true), '')::uuid)
    WITH CHECK (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid
        OR owner_id = NULLIF(current_setting('netra.user_id', true), '')::uuid);

-- bytes are seen with the file they are of, whose own policy decides
DROP POLICY own ON context.artifact_chunks;
CREATE POLICY seen ON context.artifact_chunks FOR SELECT TO netra_context
    USING (EXISTS (SELECT FROM context.artifacts AS a WHERE a.artifact_id = artifact_chunks.artifact_id));
CREATE POLICY made ON context.artifact_chunks FOR INSERT TO netra_context
    WITH CHECK (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid
        AND EXISTS (SELECT FROM context.artifacts AS a WHERE a.artifact_id = artifact_chunks.artifact_id
                    AND a.user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid));

GRANT SELECT, INSERT, UPDATE (access, request_id, created_at, withdrawn_at), DELETE ON context.grants TO netra_context;
GRANT DELETE ON context.messages, context.contexts TO netra_context;
