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
CREATE INDEX artifacts_of_thread ON context.artifacts (thread_id, artifact_id DESC) WHERE thread_id IS NOT NULL;
-- what still comes of a user, and what of theirs lies with others: both are few among all that they have
CREATE INDEX artifacts_uploading ON context.artifacts (user_id) WHERE state = 'uploading';
CREATE INDEX artifacts_elsewhere ON context.artifacts (user_id, artifact_id) WHERE user_id <> owner_id AND state = 'complete';

-- What a user keeps, counted as it changes: limits are looked at often, and nobody reads all files for that.
CREATE TABLE context.usage (
    user_id  uuid PRIMARY KEY,
    -- what counts against the limits: complete files, and such as still come
    files    bigint NOT NULL CHECK (files >= 0),
    reserved bigint NOT NULL CHECK (reserved >= 0),
    -- those that are complete
    complete bigint NOT NULL CHECK (complete >= 0),
    bytes    bigint NOT NULL CHECK (bytes >= 0)
);
-- the owner is under the wall as well
ALTER TABLE context.artifacts NO FORCE ROW LEVEL SECURITY;
INSERT INTO context.usage (user_id, files, reserved, complete, bytes)
SELECT user_id, count(*), sum(reserved), count(*) FILTER (WHERE state = 'complete'),
    coalesce(sum(reserved) FILTER (WHERE state = 'complete'), 0)
FROM context.artifacts WHERE state <> 'discarded' GROUP BY user_id;
ALTER TABLE context.artifacts FORCE ROW LEVEL SECURITY;
ALTER TABLE context.usage ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
CREATE POLICY own ON context.usage FOR SELECT TO netra_context
    USING (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid);
CREATE POLICY left_over ON context.usage TO netra_context_system USING (files = 0);
CREATE POLICY counted ON context.usage TO CURRENT_USER USING (true) WITH CHECK (true);
GRANT SELECT ON context.usage TO netra_context;
GRANT SELECT (user_id, files), DELETE ON context.usage TO netra_context_system;

-- As the owner: files are given up by others than who made them, and no role of a service may count as it likes.
CREATE FUNCTION context.count_artifacts() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        INSERT INTO context.usage AS u (user_id, files, reserved, complete, bytes)
        SELECT a.user_id, count(*), sum(a.reserved), count(*) FILTER (WHERE a.state = 'complete'),
            coalesce(sum(a.reserved) FILTER (WHERE a.state = 'complete'), 0)
        FROM added AS a WHERE a.state <> 'discarded' GROUP BY a.user_id ORDER BY a.user_id
        ON CONFLICT (user_id) DO UPDATE SET files = u.files + excluded.files, reserved = u.reserved + excluded.reserved,
            complete = u.complete + excluded.complete, bytes = u.bytes + excluded.bytes;
    ELSIF TG_OP = 'UPDATE' THEN
        UPDATE context.usage AS u SET files = u.files + d.files, reserved = u.reserved + d.reserved,
            complete = u.complete + d.complete, bytes = u.bytes + d.bytes
        FROM (
            SELECT c.user_id, sum(c.sign) AS files, sum(c.sign * c.reserved) AS reserved,
                coalesce(sum(c.sign) FILTER (WHERE c.state = 'complete'), 0) AS complete,
                coalesce(sum(c.sign * c.reserved) FILTER (WHERE c.state = 'complete'), 0) AS bytes
            FROM (SELECT user_id, 1 AS sign, state, reserved FROM added UNION ALL SELECT user_id, -1, state, reserved FROM removed) AS c
            WHERE c.state <> 'discarded' GROUP BY c.user_id ORDER BY c.user_id
        ) AS d
        WHERE u.user_id = d.user_id AND (d.files, d.reserved, d.complete, d.bytes) <> (0, 0, 0, 0);
    ELSE
        UPDATE context.usage AS u SET files = u.files - d.files, reserved = u.reserved - d.reserved,
            complete = u.complete - d.complete, bytes = u.bytes - d.bytes
        FROM (
            SELECT a.user_id, count(*) AS files, sum(a.reserved) AS reserved, count(*) FILTER (WHERE a.state = 'complete') AS complete,
                coalesce(sum(a.reserved) FILTER (WHERE a.state = 'complete'), 0) AS bytes
            FROM removed AS a WHERE a.state <> 'discarded' GROUP BY a.user_id ORDER BY a.user_id
        ) AS d
        WHERE u.user_id = d.user_id;
    END IF;
    RETURN NULL;
END
$$;
REVOKE ALL ON FUNCTION context.count_artifacts() FROM public;
CREATE TRIGGER counted_added AFTER INSERT ON context.artifacts REFERENCING NEW TABLE AS added
    FOR EACH STATEMENT EXECUTE FUNCTION context.count_artifacts();
CREATE TRIGGER counted_changed AFTER UPDATE ON context.artifacts REFERENCING OLD TABLE AS removed NEW TABLE AS added
    FOR EACH STATEMENT EXECUTE FUNCTION context.count_artifacts();
CREATE TRIGGER counted_removed AFTER DELETE ON context.artifacts REFERENCING OLD TABLE AS removed
    FOR EACH STATEMENT EXECUTE FUNCTION context.count_artifacts();

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
CREATE POLICY everything ON context.artifacts TO netra_context_system
    USING (EXISTS (SELECT FROM context.changes AS c WHERE c.user_id = artifacts.user_id AND c.asked = 'erase everything'
                   AND c.done_at IS NULL AND artifacts.created_at <= c.asked_at))
    WITH CHECK (state = 'discarded');
-- the audit trail of a user goes with its age, or with everything else of theirs, on their own wish
CREATE POLICY erased ON context.audit AS RESTRICTIVE FOR DELETE TO netra_context_system
    USING (audit.at < now() - interval '30 days' OR EXISTS (SELECT FROM context.changes AS c WHERE c.user_id = audit.user_id AND c.asked = 'erase everything' AND c.done_at IS NULL
                   AND audit.at < c.asked_at));

GRANT SELECT (thread_id, user_id, deleted_at, erased_at), UPDATE (erased_at), DELETE ON context.threads TO netra_context_system;
GRANT SELECT (thread_id, position), DELETE ON context.messages TO netra_context_system;
GRANT SELECT (thread_id, user_id, owner_id, created_at) ON context.artifacts TO netra_context_system;
GRANT SELECT (user_id, request_id, asked, asked_at, done_at), UPDATE (done_at), DELETE ON context.changes TO netra_context_system;
GRANT DELETE ON context.audit TO netra_context_system;
