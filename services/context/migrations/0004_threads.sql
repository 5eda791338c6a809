-- Threads are deleted, restored and erased; files may belong to a thread; erasures are remembered under their request.

ALTER TABLE context.threads
    -- hidden from everybody, can be restored
    ADD COLUMN deleted_at timestamptz,
    -- its content is gone, or going; the row stays so that its id is not taken again
    ADD COLUMN erased_at timestamptz,
    -- what of another table names a thread and its owner cannot be of two minds
    ADD CONSTRAINT threads_owner UNIQUE (thread_id, user_id);
CREATE INDEX threads_deleted ON context.threads (deleted_at) WHERE deleted_at IS NOT NULL AND erased_at IS NULL;
CREATE INDEX threads_erased ON context.threads (erased_at) WHERE erased_at IS NOT NULL;

ALTER TABLE context.artifacts
    ADD COLUMN thread_id uuid,
    -- the owner of that thread
    ADD COLUMN owner_id uuid,
    ADD CONSTRAINT artifacts_thread FOREIGN KEY (thread_id, owner_id) REFERENCES context.threads (thread_id, user_id),
    ADD CHECK ((thread_id IS NULL) = (owner_id IS NULL));
CREATE INDEX artifacts_of_thread ON context.artifacts (thread_id, artifact_id DESC) WHERE state = 'complete';

-- What was asked to be erased, and what became of it: the same request gets the same answer.
CREATE TABLE context.erasures (
    user_id    uuid NOT NULL,
    request_id text NOT NULL,
    -- null: everything of the user
    thread_id  uuid,
    asked_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    threads    bigint NOT NULL DEFAULT 0,
    messages   bigint NOT NULL DEFAULT 0,
    artifacts  bigint NOT NULL DEFAULT 0,
    contexts   bigint NOT NULL DEFAULT 0,
    done_at    timestamptz,
    PRIMARY KEY (user_id, request_id)
);
ALTER TABLE context.erasures ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
CREATE POLICY own ON context.erasures TO netra_context
    USING (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid)
    WITH CHECK (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid);

GRANT SELECT, INSERT, UPDATE (threads, messages, artifacts, contexts, done_at) ON context.erasures TO netra_context;
GRANT UPDATE (deleted_at, erased_at) ON context.threads TO netra_context;
GRANT INSERT (thread_id, owner_id), UPDATE (thread_id, owner_id) ON context.artifacts TO netra_context;
