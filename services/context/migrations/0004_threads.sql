-- Threads are deleted, restored and erased; files may belong to a thread; what was asked for under a request id is remembered.

ALTER TABLE context.threads
    -- hidden from everybody, can be restored
    ADD COLUMN deleted_at timestamptz,
    -- its content is gone, or going; the row goes with the last of it, as ids are made here and never the client's
    ADD COLUMN erased_at timestamptz,
    ADD CHECK (erased_at IS NULL OR deleted_at IS NOT NULL),
    -- what of another table names a thread and its owner cannot be of two minds
    ADD CONSTRAINT threads_owner UNIQUE (thread_id, user_id);
CREATE INDEX threads_deleted_of_user ON context.threads (user_id, thread_id DESC) WHERE deleted_at IS NOT NULL;
CREATE INDEX threads_deleted ON context.threads (deleted_at) WHERE deleted_at IS NOT NULL AND erased_at IS NULL;
CREATE INDEX threads_erased ON context.threads (thread_id) WHERE erased_at IS NOT NULL;

ALTER TABLE context.artifacts
    ADD COLUMN thread_id uuid,
    -- the owner of that thread
    ADD COLUMN owner_id uuid,
    ADD CONSTRAINT artifacts_thread FOREIGN KEY (thread_id, owner_id) REFERENCES context.threads (thread_id, user_id),
    ADD CHECK ((thread_id IS NULL) = (owner_id IS NULL));
-- what counts against the limits of a user
CREATE INDEX artifacts_counted ON context.artifacts (user_id) INCLUDE (reserved) WHERE state <> 'discarded';
CREATE INDEX artifacts_of_thread ON context.artifacts (thread_id, artifact_id DESC) WHERE thread_id IS NOT NULL;

-- What was asked to be done to threads and data, under which request id: the same again changes nothing, another thing is refused.
CREATE TABLE context.changes (
    user_id    uuid NOT NULL,
    request_id text NOT NULL,
    asked      text NOT NULL,
    asked_at   timestamptz NOT NULL DEFAULT now(),
    -- what an erasure found, told again when it is asked for again
    removed    jsonb,
    -- when the last of what had to be removed afterwards was
    done_at    timestamptz,
    PRIMARY KEY (user_id, request_id)
);
CREATE INDEX changes_old ON context.changes (asked_at);
CREATE INDEX changes_pending ON context.changes (user_id, request_id) WHERE asked = 'erase everything' AND done_at IS NULL;
ALTER TABLE context.changes ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
CREATE POLICY own ON context.changes TO netra_context
    USING (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid)
    WITH CHECK (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid);

GRANT SELECT, INSERT, UPDATE (removed), DELETE ON context.changes TO netra_context;
GRANT UPDATE (deleted_at, erased_at) ON context.threads TO netra_context;

-- ---------------------------------------------------------------- who removes what is left over

-- sees no thread that anybody has, nothing of one, and no change but those it has to finish or to forget
CREATE POLICY deleted ON context.threads TO netra_context_system USING (deleted_at IS NOT NULL) WITH CHECK (deleted_at IS NOT NULL);
CREATE POLICY erased ON context.messages TO netra_context_system
    USING (EXISTS (SELECT FROM context.threads AS t WHERE t.thread_id = messages.thread_id AND t.erased_at IS NOT NULL));
CREATE POLICY erased ON context.artifacts TO netra_context_system
    USING (EXISTS (SELECT FROM context.threads AS t WHERE t.thread_id = artifacts.thread_id AND t.erased_at IS NOT NULL))
    WITH CHECK (state = 'discarded');
CREATE POLICY left_over ON context.changes TO netra_context_system
    USING (asked = 'erase everything' OR asked_at < now() - interval '2 days');
-- the audit trail of a user goes with everything else of theirs, on their own wish and no other
CREATE POLICY erased ON context.audit AS RESTRICTIVE FOR DELETE TO netra_context_system
    USING (EXISTS (SELECT FROM context.changes AS c WHERE c.user_id = audit.user_id AND c.asked = 'erase everything' AND c.done_at IS NULL
                   AND audit.at < c.asked_at));

GRANT SELECT (thread_id, user_id, deleted_at, erased_at), UPDATE (erased_at), DELETE ON context.threads TO netra_context_system;
GRANT SELECT (thread_id, position), DELETE ON context.messages TO netra_context_system;
GRANT SELECT (thread_id) ON context.artifacts TO netra_context_system;
GRANT SELECT (user_id, request_id, asked, asked_at, done_at), UPDATE (done_at), DELETE ON context.changes TO netra_context_system;
GRANT DELETE ON context.audit TO netra_context_system;
