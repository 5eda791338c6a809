-- Opening a run in one statement: with what a new owner is told, and what who writes remembers of the head and the user's cursor.

-- a new head is under its first owner's epoch from the start
GRANT INSERT (epoch) ON events.heads TO netra_events;

-- Raise the epoch of a head, made when it is new; no row when the run is another user's, and `refused` when a higher epoch has it
-- already. Each statement sees what was committed while the one before it waited, so what is told of the record is as it is under the
-- lock of the head. The caller is behind the wall of the user.
CREATE FUNCTION events.open_run(
    of_user uuid, of_tenant uuid, of_run uuid, of_thread uuid, of_request text, of_correlation text, of_trace text, of_class text,
    ends_at timestamptz, owner_epoch bigint
) RETURNS TABLE (refused boolean, head events.heads, calls text[], reached bigint, reached_at timestamptz)
LANGUAGE plpgsql SECURITY INVOKER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    -- in the order of the writer's locks: cursors, then heads; a cursor that says so already is not locked
    INSERT INTO events.cursors (user_id, tenant_id) VALUES (of_user, of_tenant) ON CONFLICT DO NOTHING;
    UPDATE events.cursors c SET tenant_id = of_tenant WHERE c.user_id = of_user AND c.tenant_id IS DISTINCT FROM of_tenant;
    INSERT INTO events.heads AS h (run_id, user_id, thread_id, request_id, correlation_id, trace_id, retention, deadline, epoch)
    VALUES (of_run, of_user, of_thread, of_request, of_correlation, of_trace, of_class, ends_at, owner_epoch) ON CONFLICT DO NOTHING;
    SELECT h.* INTO head FROM events.heads h WHERE h.run_id = of_run AND h.user_id = of_user FOR UPDATE;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    -- each claim of a run has an epoch of its own
    refused := owner_epoch < head.epoch;
    IF NOT refused AND owner_epoch > head.epoch THEN
        UPDATE events.heads h SET epoch = owner_epoch WHERE h.run_id = of_run AND h.user_id = of_user;
        head.epoch := owner_epoch;
    END IF;
    IF NOT refused AND head.next_seq > 1 THEN
        calls := ARRAY(
            SELECT e.tool_call_id FROM events.events e
            WHERE e.user_id = of_user AND e.run_id = of_run AND e.type IN ('tool_executing', 'tool_completed')
              AND e.retention = head.retention AND e.recorded_at >= head.created_at AND e.recorded_at <= head.last_at
            GROUP BY e.tool_call_id HAVING count(*) FILTER (WHERE e.type = 'tool_completed') = 0 ORDER BY min(e.seq));
    END IF;
    SELECT c.last, c.last_at INTO reached, reached_at FROM events.cursors c WHERE c.user_id = of_user;
    RETURN NEXT;
END $$;

REVOKE EXECUTE ON FUNCTION events.open_run FROM PUBLIC;
GRANT EXECUTE ON FUNCTION events.open_run TO netra_events;
