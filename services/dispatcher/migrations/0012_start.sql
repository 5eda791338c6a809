-- A run of an agent is accepted in one round trip, as the user it is for: the walls are theirs. Both functions have the rights of who calls
-- them, under the policies of every statement of theirs: they set the user and the thread whom those look at, and nothing more.

-- What stands against a new run: `known`, there is one of this request; `busy`, its thread is not free, and it is not to wait for that;
-- `full`, as many of the user's wait as `most_queued`; or nothing. Of a thread those runs count that may be seen.
CREATE FUNCTION dispatcher.may_start(whose uuid, of_request text, thread uuid, when_busy text, most_queued int) RETURNS text
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM set_config('netra.user_id', whose::text, true);
    IF EXISTS (SELECT FROM dispatcher.runs AS r WHERE r.user_id = whose AND r.request_id = of_request) THEN
        RETURN 'known';
    END IF;
    IF when_busy = 'reject' AND EXISTS (SELECT FROM dispatcher.runs AS r
            WHERE r.thread_id = thread AND r.kind = 'agent' AND r.state IN ('queued', 'running', 'suspended')) THEN
        RETURN 'busy';
    END IF;
    -- what is queued is found by the index of its user
    IF (SELECT count(*) FROM dispatcher.runs AS r WHERE r.user_id = whose AND r.state = 'queued' AND r.cancelled_at IS NULL)
            >= most_queued THEN
        RETURN 'full';
    END IF;
    RETURN '';
END
$$;

-- What became of it: what `may_start` says, or it was added and has these times; one that runs at once has an `owner` and was started.
-- `stopped` are the user's earlier runs on the thread that were asked to end for it.
CREATE FUNCTION dispatcher.start_run(
    run uuid, whose uuid, thread uuid, of_request text, content bytea, message uuid, name text, asked text, given bytea, lasts_s float8,
    frame bytea, token text, correlation text, parent text, of_tier text, of_session uuid, version text, wanted_by text, lease_s float8,
    passed jsonb, most_queued int, when_busy text, concurrent int,
    OUT refused text, OUT stopped uuid[], OUT made_at timestamptz, OUT began_at timestamptz
) LANGUAGE plpgsql AS $$
DECLARE
    begins boolean;
BEGIN
    PERFORM set_config('netra.user_id', whose::text, true), set_config('netra.thread_id', thread::text, true);
    -- one user's starts queue up here, and those of one thread; each statement sees what was committed while the one before it waited, so
    -- the counts below are exact
    PERFORM pg_advisory_xact_lock(hashtextextended('start ' || whose, 0));
    PERFORM pg_advisory_xact_lock(hashtextextended('start in ' || thread, 0));
    refused := dispatcher.may_start(whose, of_request, thread, when_busy, most_queued);
    IF refused <> '' THEN
        RETURN;
    END IF;
    -- Claims take what waits, and what is suspended, at any moment: of a user who has anything waiting nothing begins here, and what is
    -- suspended counts as if it executed. So however a claim and this one meet, no more execute than may. Each state has its own index.
    begins := wanted_by IS NOT NULL
        AND NOT EXISTS (SELECT FROM dispatcher.runs AS r WHERE r.user_id = whose AND r.state = 'queued' AND r.cancelled_at IS NULL)
        AND NOT EXISTS (SELECT FROM dispatcher.runs AS r
            WHERE r.thread_id = thread AND r.kind = 'agent' AND r.state IN ('queued', 'running', 'suspended'))
        AND concurrent > (SELECT count(*) FROM dispatcher.runs AS r WHERE r.user_id = whose AND r.kind = 'agent' AND r.state = 'running')
            + (SELECT count(*) FROM dispatcher.runs AS r WHERE r.user_id = whose AND r.kind = 'agent' AND r.state = 'suspended');
    IF when_busy IN ('interrupt', 'rollback') THEN
        WITH earlier AS (
            SELECT r.run_id FROM dispatcher.runs AS r
            WHERE r.user_id = whose AND r.thread_id = thread AND r.kind = 'agent' AND r.state IN ('queued', 'running', 'suspended')
            ORDER BY r.run_id FOR NO KEY UPDATE
        ), asked_to_stop AS (
            UPDATE dispatcher.runs AS r
            SET cancelled_at = coalesce(r.cancelled_at, now()),
                rolled_back_at = CASE when_busy WHEN 'rollback' THEN now() ELSE r.rolled_back_at END
            FROM earlier WHERE r.run_id = earlier.run_id RETURNING r.run_id
        )
        SELECT array_agg(run_id) INTO stopped FROM asked_to_stop;
    END IF;
    -- Times of a run that begins at once are read here: the locks above may have been waited for. Columns get their values in the order
    -- that the table has them in, so it begins after it was made.
    INSERT INTO dispatcher.runs (run_id, user_id, thread_id, request_id, digest, message_id, kind, agent, request, inputs, deadline_s,
        context, context_token, correlation_id, traceparent, tier, session_id, agent_version, lease_owner, state, epoch, lease_until,
        started_at, running_since, stages)
    VALUES (run, whose, thread, of_request, content, message, 'agent', name, asked, given, lasts_s, frame, token, correlation, parent, of_tier,
        of_session, version, CASE WHEN begins THEN wanted_by END, CASE WHEN begins THEN 'running' ELSE 'queued' END,
        CASE WHEN begins THEN 1 ELSE 0 END, CASE WHEN begins THEN clock_timestamp() + make_interval(secs => lease_s) END,
        CASE WHEN begins THEN clock_timestamp() END, CASE WHEN begins THEN clock_timestamp() END,
        CASE WHEN begins THEN jsonb_build_object('routing_to_agent', clock_timestamp()) ELSE '{}' END || passed)
    RETURNING created_at, started_at INTO made_at, began_at;
END
$$;
REVOKE EXECUTE ON FUNCTION dispatcher.may_start, dispatcher.start_run FROM public;
GRANT EXECUTE ON FUNCTION dispatcher.may_start, dispatcher.start_run TO netra_dispatcher;
-- one that is interrupted leaves it as it is
GRANT SELECT (rolled_back_at) ON dispatcher.runs TO netra_dispatcher;
