-- Grants: the owner of a thread lets others of the tenant read it or write to it. What of a thread is whose is said by `owner_id` (whose
-- thread it is) beside `user_id` (whose doing it is). Policies of grants look at no other table: those of the others may look at grants.

-- Whether a thread is hidden from all but its owner: deleted, or erased, which no thread is that is not deleted.
ALTER TABLE context.threads
    ADD COLUMN hidden boolean GENERATED ALWAYS AS (deleted_at IS NOT NULL) STORED,
    ADD CONSTRAINT threads_hidden UNIQUE (thread_id, user_id, hidden);

CREATE TABLE context.grants (
    thread_id    uuid NOT NULL,
    owner_id     uuid NOT NULL,
    tenant_id    uuid NOT NULL,
    grantee_id   uuid NOT NULL,
    access       text NOT NULL CHECK (access IN ('read', 'write')),
    created_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    withdrawn_at timestamptz,
    -- as the thread says, kept by the database itself: policies look at grants, and those of grants cannot look at threads
    hidden       boolean NOT NULL DEFAULT false,
    PRIMARY KEY (thread_id, grantee_id),
    CHECK (owner_id <> grantee_id),
    -- nobody grants what is not theirs, or deleted, whatever the code does
    CONSTRAINT grants_owner FOREIGN KEY (thread_id, owner_id, hidden) REFERENCES context.threads (thread_id, user_id, hidden)
        ON UPDATE CASCADE
);
CREATE INDEX grants_received ON context.grants (grantee_id, thread_id DESC) WHERE withdrawn_at IS NULL;
CREATE INDEX grants_given ON context.grants (owner_id, thread_id, created_at, grantee_id);

ALTER TABLE context.grants ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
CREATE POLICY own ON context.grants TO netra_context
    USING (owner_id = NULLIF(current_setting('netra.user_id', true), '')::uuid)
    WITH CHECK (owner_id = NULLIF(current_setting('netra.user_id', true), '')::uuid);
CREATE POLICY received ON context.grants FOR SELECT TO netra_context
    USING (grantee_id = NULLIF(current_setting('netra.user_id', true), '')::uuid AND withdrawn_at IS NULL);
-- who has everything of theirs erased leaves the threads that were granted to them
CREATE POLICY erased ON context.grants FOR DELETE TO netra_context
    USING (grantee_id = NULLIF(current_setting('netra.user_id', true), '')::uuid);
CREATE POLICY left_over ON context.grants TO netra_context_system
    USING (EXISTS (SELECT FROM context.threads AS t WHERE t.thread_id = grants.thread_id AND t.erased_at IS NOT NULL));

-- ---------------------------------------------------------------- whose thread it is

-- the owner is under the wall as well
ALTER TABLE context.messages NO FORCE ROW LEVEL SECURITY;
ALTER TABLE context.contexts NO FORCE ROW LEVEL SECURITY;
ALTER TABLE context.messages
    ADD COLUMN owner_id uuid,
    -- its author had it erased: of a message in a thread of somebody else the place stays, so that positions stay contiguous
    ADD COLUMN erased_at timestamptz,
    DROP CONSTRAINT messages_content_check,
    -- the one of the pair, below, tells both
    DROP CONSTRAINT messages_thread_id_fkey,
    ADD CONSTRAINT messages_content_check
        CHECK (octet_length(content) <= 262144 AND (content = '') = (erased_at IS NOT NULL));
ALTER TABLE context.contexts ADD COLUMN owner_id uuid;
UPDATE context.messages SET owner_id = user_id;
UPDATE context.contexts SET owner_id = user_id;
ALTER TABLE context.messages ALTER COLUMN owner_id SET NOT NULL,
    ADD CONSTRAINT messages_thread FOREIGN KEY (thread_id, owner_id) REFERENCES context.threads (thread_id, user_id);
ALTER TABLE context.contexts ALTER COLUMN owner_id SET NOT NULL,
    -- in the place of the one to the thread alone: a context is opened often, and one check tells both
    DROP CONSTRAINT contexts_thread_id_fkey,
    ADD CONSTRAINT contexts_thread FOREIGN KEY (thread_id, owner_id) REFERENCES context.threads (thread_id, user_id);
-- ids are UUIDv7 made here: their order is the order of creation
CREATE INDEX contexts_open_of_owner ON context.contexts (owner_id, thread_id) WHERE closed_at IS NULL;
CREATE INDEX messages_elsewhere ON context.messages (user_id, message_id) WHERE user_id <> owner_id;
ALTER TABLE context.messages FORCE ROW LEVEL SECURITY;
ALTER TABLE context.contexts FORCE ROW LEVEL SECURITY;

-- ---------------------------------------------------------------- walls

-- A granted thread is seen while its owner has it, counted by whoever writes to it, and deleted by nobody else. EXISTS and not IN: the
-- planner looks a single thread up, and gathers the grants of a user only where many threads are asked for.
CREATE POLICY granted ON context.threads FOR SELECT TO netra_context
    USING (deleted_at IS NULL AND erased_at IS NULL AND EXISTS (
        SELECT FROM context.grants AS g WHERE g.thread_id = threads.thread_id
            AND g.grantee_id = NULLIF(current_setting('netra.user_id', true), '')::uuid
            AND g.withdrawn_at IS NULL));
CREATE POLICY granted_write ON context.threads FOR UPDATE TO netra_context
    USING (deleted_at IS NULL AND erased_at IS NULL AND EXISTS (
        SELECT FROM context.grants AS g WHERE g.thread_id = threads.thread_id
            AND g.grantee_id = NULLIF(current_setting('netra.user_id', true), '')::uuid
            AND g.access = 'write' AND g.withdrawn_at IS NULL));

-- Messages, contexts, files: seen by whose doing they are, by the owner of the thread, and (messages and files) by whom it is granted
-- to, unless it is deleted. Made by oneself only, in a thread of one's own or one granted for writing.
DROP POLICY own ON context.messages;
CREATE POLICY seen ON context.messages FOR SELECT TO netra_context
    USING (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid
        OR owner_id = NULLIF(current_setting('netra.user_id', true), '')::uuid
        OR EXISTS (
            SELECT FROM context.grants AS g WHERE g.thread_id = messages.thread_id
            AND g.grantee_id = NULLIF(current_setting('netra.user_id', true), '')::uuid
            AND g.withdrawn_at IS NULL AND NOT g.hidden));
CREATE POLICY made ON context.messages FOR INSERT TO netra_context
    WITH CHECK (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid
        AND (owner_id = user_id OR EXISTS (
            SELECT FROM context.grants AS g WHERE g.thread_id = messages.thread_id
            AND g.grantee_id = NULLIF(current_setting('netra.user_id', true), '')::uuid
            AND g.access = 'write' AND g.withdrawn_at IS NULL AND NOT g.hidden)));
-- all that an author can change of a message is that nothing is left of it
CREATE POLICY blanked ON context.messages FOR UPDATE TO netra_context
    USING (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid)
    WITH CHECK (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid AND erased_at IS NOT NULL);

DROP POLICY own ON context.contexts;
CREATE POLICY seen ON context.contexts FOR SELECT TO netra_context
    USING (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid);
CREATE POLICY made ON context.contexts FOR INSERT TO netra_context
    WITH CHECK (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid
        AND (owner_id = user_id OR EXISTS (
            SELECT FROM context.grants AS g WHERE g.thread_id = contexts.thread_id
            AND g.grantee_id = NULLIF(current_setting('netra.user_id', true), '')::uuid
            AND g.access = 'write' AND g.withdrawn_at IS NULL AND NOT g.hidden)));
CREATE POLICY changed ON context.contexts FOR UPDATE TO netra_context
    USING (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid)
    WITH CHECK (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid);
-- the owner of a thread is told whether a run still goes on in it, before they erase it
CREATE POLICY of_thread ON context.contexts FOR SELECT TO netra_context
    USING (owner_id = NULLIF(current_setting('netra.user_id', true), '')::uuid AND closed_at IS NULL);

DROP POLICY own ON context.artifacts;
CREATE POLICY seen ON context.artifacts FOR SELECT TO netra_context
    USING (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid
        OR owner_id = NULLIF(current_setting('netra.user_id', true), '')::uuid
        OR EXISTS (
            SELECT FROM context.grants AS g WHERE g.thread_id = artifacts.thread_id
            AND g.grantee_id = NULLIF(current_setting('netra.user_id', true), '')::uuid
            AND g.withdrawn_at IS NULL AND NOT g.hidden));
CREATE POLICY made ON context.artifacts FOR INSERT TO netra_context
    WITH CHECK (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid
        AND (owner_id IS NULL OR owner_id = user_id OR EXISTS (
            SELECT FROM context.grants AS g WHERE g.thread_id = artifacts.thread_id
            AND g.grantee_id = NULLIF(current_setting('netra.user_id', true), '')::uuid
            AND g.access = 'write' AND g.withdrawn_at IS NULL AND NOT g.hidden)));
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

GRANT SELECT, INSERT, UPDATE (access, created_at, withdrawn_at), DELETE ON context.grants TO netra_context;
GRANT UPDATE (content, request_id, erased_at) ON context.messages TO netra_context;
GRANT SELECT (thread_id), DELETE ON context.grants TO netra_context_system;
