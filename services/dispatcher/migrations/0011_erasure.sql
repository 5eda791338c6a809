-- Erasure and export of what is kept of runs, and the end of what is old: rows of runs that ended go when their tier keeps them no longer.

-- What is left of a run that was erased tells a repeated request what became of it, for as long as requests are known; nothing of what
-- was in it. Nobody is shown it.
ALTER TABLE dispatcher.runs ADD COLUMN erased_at timestamptz;
COMMENT ON COLUMN dispatcher.runs.erased_at IS 'Since then nothing of its content is left.';
CREATE INDEX runs_ended ON dispatcher.runs (tier, ended_at) WHERE ended_at IS NOT NULL;
CREATE INDEX runs_erased ON dispatcher.runs (created_at) WHERE erased_at IS NOT NULL;
CREATE INDEX approval_votes_of_user ON dispatcher.approval_votes (user_id, approval_id);
GRANT SELECT (erased_at) ON dispatcher.runs TO netra_dispatcher;

-- Who had what erased; it is the proof as well. Without a thread it is everything of the user.
CREATE TABLE dispatcher.erasures (
    user_id     uuid NOT NULL,
    request_id  text NOT NULL CHECK (length(request_id) BETWEEN 1 AND 64),
    thread_id   uuid,
    asked_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    runs        bigint NOT NULL DEFAULT 0,
    done_at     timestamptz,
    PRIMARY KEY (user_id, request_id)
);
CREATE INDEX erasures_open ON dispatcher.erasures (asked_at) WHERE done_at IS NULL;
ALTER TABLE dispatcher.erasures ENABLE ROW LEVEL SECURITY;
ALTER TABLE dispatcher.erasures FORCE ROW LEVEL SECURITY;
CREATE POLICY own ON dispatcher.erasures TO netra_dispatcher
    USING (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid)
    WITH CHECK (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid);
CREATE POLICY system ON dispatcher.erasures TO netra_dispatcher_system USING (true) WITH CHECK (true);
GRANT SELECT, INSERT (user_id, request_id, thread_id), UPDATE (runs, done_at) ON dispatcher.erasures TO netra_dispatcher;
GRANT SELECT ON dispatcher.erasures TO netra_dispatcher_system;

-- the owner is under the walls as well; the functions below run as the owner, for the user whom the transaction is for and nobody else
CREATE POLICY owner_runs ON dispatcher.runs TO CURRENT_USER USING (true) WITH CHECK (true);
CREATE POLICY owner_messages ON dispatcher.messages TO CURRENT_USER USING (true) WITH CHECK (true);
CREATE POLICY owner_approvals ON dispatcher.approvals TO CURRENT_USER USING (true) WITH CHECK (true);
CREATE POLICY owner_approval_votes ON dispatcher.approval_votes TO CURRENT_USER USING (true) WITH CHECK (true);

CREATE FUNCTION dispatcher.require_user(of_user uuid) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF of_user IS DISTINCT FROM NULLIF(current_setting('netra.user_id', true), '')::uuid THEN
        RAISE insufficient_privilege USING MESSAGE = 'this is of another user';
    END IF;
END $$;

-- Take the content of some runs of a user that have ended, from after a run on, of a thread or of all: how many, and up to which run.
-- What was sent to them and what they asked for goes whole. A context that is still to be closed keeps its token until it is.
CREATE FUNCTION dispatcher.erase_some(of_user uuid, of_thread uuid, upto timestamptz, after uuid, many int)
RETURNS TABLE (gone int, through uuid)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    meant uuid[];
    asked uuid[];
BEGIN
    PERFORM dispatcher.require_user(of_user);
    meant := ARRAY(
        SELECT r.run_id FROM dispatcher.runs AS r
        WHERE r.user_id = of_user AND (of_thread IS NULL OR r.thread_id = of_thread) AND r.run_id > after AND r.created_at <= upto
          AND r.erased_at IS NULL AND r.state IN ('completed', 'failed', 'cancelled', 'timed_out')
        ORDER BY r.run_id LIMIT many FOR NO KEY UPDATE);
    asked := ARRAY(SELECT a.approval_id FROM dispatcher.approvals AS a WHERE a.run_id = ANY(meant));
    DELETE FROM dispatcher.approval_votes AS v WHERE v.approval_id = ANY(asked);
    DELETE FROM dispatcher.approvals AS a WHERE a.approval_id = ANY(asked);
    DELETE FROM dispatcher.messages AS m WHERE m.run_id = ANY(meant);
    UPDATE dispatcher.runs AS r
    SET erased_at = clock_timestamp(), request = '', inputs = '{}', outcome = NULL, context = '', traceparent = '', session_id = NULL,
        stages = '{}', roles = NULL, narrowed_at = NULL, context_token = CASE WHEN r.context_open THEN r.context_token ELSE '' END
    WHERE r.run_id = ANY(meant);
    RETURN QUERY SELECT cardinality(meant), meant[cardinality(meant)];
END $$;

-- Take the words of a user out of some of the messages that they sent to runs of others, and of their votes on what those asked for:
-- how many are left without. Their places stay, and how they voted: the runs are those of others.
CREATE FUNCTION dispatcher.erase_said(of_user uuid, of_thread uuid, upto timestamptz, many int) RETURNS int
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    said int;
    voted int;
BEGIN
    PERFORM dispatcher.require_user(of_user);
    UPDATE dispatcher.messages AS m SET content = '' WHERE (m.run_id, m.number) IN (
        SELECT f.run_id, f.number FROM dispatcher.messages AS f
        WHERE f.user_id = of_user AND f.owner_id <> of_user AND f.content <> '' AND f.created_at <= upto
          AND (of_thread IS NULL OR f.thread_id = of_thread) ORDER BY f.run_id, f.number LIMIT many);
    GET DIAGNOSTICS said = ROW_COUNT;
    UPDATE dispatcher.approval_votes AS v SET comment = '' WHERE v.user_id = of_user AND v.approval_id IN (
        SELECT f.approval_id FROM dispatcher.approval_votes AS f
        WHERE f.user_id = of_user AND f.owner_id <> of_user AND f.comment <> '' AND f.at <= upto
          AND (of_thread IS NULL OR f.thread_id = of_thread) ORDER BY f.approval_id LIMIT many);
    GET DIAGNOSTICS voted = ROW_COUNT;
    RETURN greatest(said, voted);
END $$;

-- Some runs of a user with what they were asked, which nobody else is told, from after a run on.
CREATE FUNCTION dispatcher.export_runs(of_user uuid, after uuid, many int)
RETURNS TABLE (run_id uuid, thread_id uuid, request_id text, message_id uuid, run_kind text, agent text, agent_version text, state text,
               request text, inputs bytea, outcome bytea, correlation_id text, created_at timestamptz, started_at timestamptz,
               ended_at timestamptz)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM dispatcher.require_user(of_user);
    RETURN QUERY
    SELECT r.run_id, r.thread_id, r.request_id, r.message_id, r.kind, r.agent, r.agent_version, r.state, r.request, r.inputs, r.outcome,
           r.correlation_id, r.created_at, r.started_at, r.ended_at
    FROM dispatcher.runs AS r WHERE r.user_id = of_user AND r.run_id > after AND r.erased_at IS NULL ORDER BY r.run_id LIMIT many;
END $$;

REVOKE EXECUTE ON FUNCTION dispatcher.require_user, dispatcher.erase_some, dispatcher.erase_said, dispatcher.export_runs FROM PUBLIC;
GRANT EXECUTE ON FUNCTION dispatcher.erase_some, dispatcher.erase_said, dispatcher.export_runs TO netra_dispatcher;

-- Across users: what is old goes.
GRANT DELETE ON dispatcher.runs, dispatcher.messages, dispatcher.approvals, dispatcher.approval_votes TO netra_dispatcher_system;
