-- A call of a tool is accepted and begins in one round trip, as the user it is for: the walls are theirs.

-- Whether it was made: it is not where there is a run of this request, or where as many of the user's wait as `most_queued`.
-- With the rights of who calls it, under the policies of every statement of theirs: it sets the user whom those look at, and nothing more.
CREATE FUNCTION dispatcher.begin_call(
    run uuid, whose uuid, thread uuid, request text, content bytea, tool text, given bytea, lasts_s float8, frame bytea, token text,
    correlation text, parent text, of_tier text, of_session uuid, owner text, lease_s float8, passed jsonb, most_queued int
) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    made boolean := false;
BEGIN
    PERFORM set_config('netra.user_id', whose::text, true);
    -- what is queued is found by the index of its user
    IF (SELECT count(*) FROM dispatcher.runs AS r WHERE r.user_id = whose AND r.state = 'queued' AND r.cancelled_at IS NULL)
        < most_queued THEN
        -- columns get their values in the order that the table has them in, so it begins after it was made
        INSERT INTO dispatcher.runs (run_id, user_id, thread_id, request_id, digest, kind, agent, request, inputs, deadline_s, context,
            context_token, correlation_id, traceparent, tier, session_id, lease_owner, state, epoch, lease_until, started_at, running_since,
            stages)
        VALUES (run, whose, thread, request, content, 'tool', tool, '', given, lasts_s, frame, token, correlation, parent, of_tier,
            of_session, owner, 'running', 1, clock_timestamp() + make_interval(secs => lease_s), clock_timestamp(), clock_timestamp(),
            jsonb_build_object('routing_to_agent', clock_timestamp()) || passed)
        ON CONFLICT DO NOTHING;
        made := FOUND;
    END IF;
    PERFORM set_config('netra.user_id', '', true);
    RETURN made;
END
$$;
REVOKE EXECUTE ON FUNCTION dispatcher.begin_call FROM public;
GRANT EXECUTE ON FUNCTION dispatcher.begin_call TO netra_dispatcher;
