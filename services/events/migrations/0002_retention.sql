-- What is kept how long: a partition per retention class and day; the days of each user, so that a page looks into few of them;
-- erasure of one user; events without a run.

-- ---------------------------------------------------------------- tables

-- `last_at`: time does not go back within a user's record, so days are in the order of cursors
ALTER TABLE events.cursors ADD COLUMN last_at timestamptz NOT NULL DEFAULT 'epoch', ADD COLUMN tenant_id uuid;

-- A row per user, day (UTC) and class in which there are events, with the first of them.
CREATE TABLE events.days (
    user_id      uuid NOT NULL,
    day          date NOT NULL,
    retention    text NOT NULL,
    first_cursor bigint NOT NULL,
    PRIMARY KEY (user_id, day, retention)
);
CREATE INDEX days_class ON events.days (retention, day, user_id);

-- How many days a class is kept; a shorter period that is wanted counts some time after `since`.
CREATE TABLE events.classes (
    retention text PRIMARY KEY,
    days      int NOT NULL CHECK (days > 0),
    wanted    int NOT NULL CHECK (wanted > 0),
    since     timestamptz NOT NULL
);

-- Who had the record of a user erased, up to which cursor; it is the proof as well.
CREATE TABLE events.erasures (
    user_id    uuid NOT NULL,
    request_id text NOT NULL CHECK (length(request_id) BETWEEN 1 AND 64),
    asked_by   uuid NOT NULL,
    asked_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    upto       bigint NOT NULL,
    events     bigint NOT NULL DEFAULT 0,
    runs       bigint NOT NULL DEFAULT 0,
    done_at    timestamptz,
    PRIMARY KEY (user_id, request_id)
);
CREATE INDEX erasures_open ON events.erasures (asked_at) WHERE done_at IS NULL;

-- What is left of the head of a run whose user's record was erased: it cannot be opened as a new one and run again.
ALTER TABLE events.heads ADD COLUMN erased boolean NOT NULL DEFAULT false;
-- not by what an append changes: heads are updated in place
CREATE INDEX heads_class ON events.heads (retention, created_at);
-- an event without a run is known again by its id
CREATE INDEX events_without_run ON events.events (user_id, event_id) WHERE run_id IS NULL;

-- ---------------------------------------------------------------- walls

ALTER TABLE events.days ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
ALTER TABLE events.erasures ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;

CREATE POLICY own_days ON events.days TO netra_events
    USING (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid)
    WITH CHECK (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid);
CREATE POLICY own_erasures ON events.erasures TO netra_events
    USING (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid)
    WITH CHECK (user_id = NULLIF(current_setting('netra.user_id', true), '')::uuid);
CREATE POLICY system_days ON events.days TO netra_events_system USING (true) WITH CHECK (true);
CREATE POLICY system_erasures ON events.erasures TO netra_events_system USING (true) WITH CHECK (true);
-- the owner is under the wall as well; the functions below run as the owner
CREATE POLICY owner_events ON events.events TO CURRENT_USER USING (true);
CREATE POLICY owner_steps ON events.steps TO CURRENT_USER USING (true);
CREATE POLICY owner_cursors ON events.cursors TO CURRENT_USER USING (true);
CREATE POLICY owner_days ON events.days TO CURRENT_USER USING (true);

-- ---------------------------------------------------------------- partitions

ALTER TABLE events.events DETACH PARTITION events.events_other;
DO $$
DECLARE
    class text;
BEGIN
    FOREACH class IN ARRAY ARRAY['free', 'early', 'business', 'enterprise', 'internal'] LOOP
        EXECUTE format('CREATE TABLE events.%I PARTITION OF events.events FOR VALUES IN (%L) PARTITION BY RANGE (recorded_at)',
                       'events_' || class, class);
        -- what was recorded on a day without a partition of its own
        EXECUTE format('CREATE TABLE events.%I PARTITION OF events.%I DEFAULT', 'events_' || class || '_rest', 'events_' || class);
        EXECUTE format('CREATE INDEX ON events.%I (recorded_at)', 'events_' || class || '_rest');
        EXECUTE format('ALTER TABLE events.%I ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY', 'events_' || class);
        EXECUTE format('ALTER TABLE events.%I ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY', 'events_' || class || '_rest');
    END LOOP;
END $$;

-- what is there already moves to its class
ALTER TABLE events.events_other_always NO FORCE ROW LEVEL SECURITY;
WITH moved AS (
    DELETE FROM events.events_other_always WHERE retention IN ('free', 'early', 'business', 'enterprise', 'internal')
    RETURNING retention, recorded_at, user_id, cursor, run_id, seq, thread_id, event_id, type, tool_call_id, ends, frame
)
INSERT INTO events.events (retention, recorded_at, user_id, cursor, run_id, seq, thread_id, event_id, type, tool_call_id, ends, frame)
SELECT retention, recorded_at, user_id, cursor, run_id, seq, thread_id, event_id, type, tool_call_id, ends, frame FROM moved;
ALTER TABLE events.events_other_always FORCE ROW LEVEL SECURITY;
ALTER TABLE events.events ATTACH PARTITION events.events_other DEFAULT;

INSERT INTO events.days (user_id, day, retention, first_cursor)
SELECT user_id, (recorded_at AT TIME ZONE 'UTC')::date, retention, min(cursor) FROM events.events GROUP BY 1, 2, 3;
UPDATE events.cursors c SET last_at = e.last_at
FROM (SELECT user_id, max(recorded_at) AS last_at FROM events.events GROUP BY user_id) e WHERE e.user_id = c.user_id;

-- ---------------------------------------------------------------- what only the owner can do

-- Make the partition of a day that is still to come, in steps that hold up nobody, each in a transaction of its own: `again` until it
-- is `made`; empty when it is there, or the class has none. An append finds the rest of its class held no longer than a step takes.
CREATE FUNCTION events.prepare_day(of_class text, of_day date) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '200ms' AS $$
DECLARE
    parent text := 'events_' || of_class;
    rest text := parent || '_rest';
    part text := parent || '_' || to_char(of_day, 'YYYYMMDD');
    closed text := 'closed_' || to_char(of_day, 'YYYYMMDD');
    day_begins timestamptz := of_day::timestamp AT TIME ZONE 'UTC';
    day_ends timestamptz := (of_day + 1)::timestamp AT TIME ZONE 'UTC';
    checked boolean;
BEGIN
    -- other replicas sweep as well
    PERFORM pg_advisory_xact_lock(hashtextextended('events.' || parent, 0));
    IF to_regclass(format('events.%I', rest)) IS NULL OR to_regclass(format('events.%I', part)) IS NOT NULL THEN
        RETURN '';
    END IF;
    -- whoever attaches a day has the rest looked through under a lock that nobody passes, unless a constraint says that the day is not
    -- in it; what has begun, or is about to, cannot be closed to appends
    IF day_begins > clock_timestamp() + interval '1 hour' THEN
        SELECT c.convalidated INTO checked FROM pg_constraint c
        WHERE c.conrelid = format('events.%I', rest)::regclass AND c.conname = closed;
        IF checked IS NULL THEN
            EXECUTE format('ALTER TABLE events.%I ADD CONSTRAINT %I CHECK (recorded_at < %L OR recorded_at >= %L) NOT VALID',
                           rest, closed, day_begins, day_ends);
            RETURN 'again';
        ELSIF NOT checked THEN
            EXECUTE format('ALTER TABLE events.%I VALIDATE CONSTRAINT %I', rest, closed);
            RETURN 'again';
        END IF;
    END IF;
    -- beside the others first, then among them: that takes the weaker lock
    EXECUTE format('CREATE TABLE events.%I (LIKE events.%I INCLUDING ALL)', part, parent);
    EXECUTE format('ALTER TABLE events.%I ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY', part);
    EXECUTE format('ALTER TABLE events.%I ATTACH PARTITION events.%I FOR VALUES FROM (%L) TO (%L)', parent, part, day_begins, day_ends);
    EXECUTE format('ALTER TABLE events.%I DROP CONSTRAINT IF EXISTS %I', rest, closed);
    RETURN 'made';
END $$;

-- Open what a preparation left closed when it was interrupted: events of such a day would be refused.
CREATE FUNCTION events.reopen_days(of_class text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '200ms' AS $$
DECLARE
    rest regclass := to_regclass(format('events.%I', 'events_' || of_class || '_rest'));
    closed name;
BEGIN
    FOR closed IN SELECT c.conname FROM pg_constraint c WHERE c.conrelid = rest AND c.conname ~ '^closed_[0-9]{8}$' LOOP
        EXECUTE format('ALTER TABLE %s DROP CONSTRAINT IF EXISTS %I', rest, closed);
    END LOOP;
END $$;

-- Whether a user's events of a class and day stay beyond their time: before the last of them lies something of another class whose
-- time has not come, and a record has no hole. A class of which nothing is known is kept.
CREATE FUNCTION events.must_stay(of_user uuid, of_class text, of_day date, today date) RETURNS boolean
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_custom_plan AS $$
BEGIN
    RETURN EXISTS (
        SELECT FROM events.days d LEFT JOIN events.classes c ON c.retention = d.retention
        WHERE d.user_id = of_user AND d.retention <> of_class AND d.day <= of_day
          AND d.day >= coalesce(today - c.days, '-infinity'::date)
          AND (d.day < of_day OR d.first_cursor < (
              SELECT max(e.cursor) FROM events.events e WHERE e.user_id = of_user AND e.retention = of_class
              AND e.recorded_at >= of_day::timestamp AT TIME ZONE 'UTC' AND e.recorded_at < (of_day + 1)::timestamp AT TIME ZONE 'UTC')));
END $$;

-- Drop a day of a class, or of a day without a partition some events; true when it is gone. No cursor is left below it. Of users for
-- whom it must stay, it stays.
CREATE FUNCTION events.drop_day(of_class text, of_day date, today date, many int) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '200ms'
SET plan_cache_mode = force_custom_plan AS $$
DECLARE
    parent text := format('events.%I', 'events_' || of_class);
    part text := format('events.%I', 'events_' || of_class || '_' || to_char(of_day, 'YYYYMMDD'));
    day_begins timestamptz := of_day::timestamp AT TIME ZONE 'UTC';
    day_ends timestamptz := (of_day + 1)::timestamp AT TIME ZONE 'UTC';
    stay uuid[];
    gone bigint := 0;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended('events.events_' || of_class, 0));
    stay := ARRAY(SELECT d.user_id FROM events.days d WHERE d.retention = of_class AND d.day = of_day
                  AND events.must_stay(d.user_id, of_class, of_day, today));
    -- readers are sent past the day some users at a time before it is dropped: this finds nobody, or whoever came in between
    UPDATE events.cursors c SET oldest = d.last + 1
    FROM (
        SELECT days.user_id, (SELECT max(e.cursor) FROM events.events e WHERE e.user_id = days.user_id AND e.retention = of_class
                              AND e.recorded_at >= day_begins AND e.recorded_at < day_ends) AS last
        FROM events.days WHERE days.retention = of_class AND days.day = of_day AND days.user_id <> ALL(stay)
    ) d
    WHERE c.user_id = d.user_id AND c.oldest <= d.last;
    IF to_regclass(part) IS NULL THEN
        DELETE FROM events.events WHERE retention = of_class AND recorded_at >= day_begins AND recorded_at < day_ends AND ctid = ANY(ARRAY(
            SELECT ctid FROM events.events WHERE retention = of_class AND recorded_at >= day_begins AND recorded_at < day_ends
            AND user_id <> ALL(stay) LIMIT many));
        GET DIAGNOSTICS gone = ROW_COUNT;
    ELSIF cardinality(stay) = 0 THEN
        EXECUTE 'DROP TABLE ' || part;
    ELSE
        -- the few that stay go to the rest of the class, where days without a partition are
        EXECUTE format('ALTER TABLE %s DETACH PARTITION %s', parent, part);
        EXECUTE format('ALTER TABLE %s NO FORCE ROW LEVEL SECURITY', part);
        EXECUTE format('INSERT INTO events.events (%1$s) SELECT %1$s FROM %2$s WHERE user_id = ANY($1)', 'retention, recorded_at, user_id,'
                       ' cursor, run_id, seq, thread_id, event_id, type, tool_call_id, ends, frame', part) USING stay;
        EXECUTE 'DROP TABLE ' || part;
    END IF;
    IF gone < many THEN
        DELETE FROM events.days WHERE retention = of_class AND day = of_day AND user_id <> ALL(stay);
    END IF;
    RETURN gone < many;
END $$;

-- Digests tell whether an append was committed before: nobody who crosses users reads what is in an event or a step.
CREATE FUNCTION events.earlier_events(
    users uuid[], runs uuid[], firsts bigint[], lasts bigint[], classes text[], since timestamptz, until timestamptz
) RETURNS TABLE (of_run uuid, at_seq bigint, at_cursor bigint, at_time timestamptz, digest bytea)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_custom_plan AS $$
BEGIN
    RETURN QUERY
    SELECT e.run_id, e.seq, e.cursor, e.recorded_at, sha256(e.frame)
    FROM unnest(users, runs, firsts, lasts) AS w (user_id, run_id, first, last)
    JOIN events.events e ON e.user_id = w.user_id AND e.run_id = w.run_id AND e.seq BETWEEN w.first AND w.last
    WHERE e.retention = ANY(classes) AND e.recorded_at >= since AND e.recorded_at <= until;
END $$;

CREATE FUNCTION events.earlier_steps(runs uuid[]) RETURNS TABLE (of_run uuid, at_key text, digest bytea)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT run_id, key, sha256(result) FROM events.steps WHERE run_id = ANY(runs)
$$;

CREATE FUNCTION events.earlier_without_run(users uuid[], event_ids uuid[], since timestamptz)
RETURNS TABLE (of_user uuid, of_event uuid, at_cursor bigint, at_time timestamptz, digest bytea)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET plan_cache_mode = force_custom_plan AS $$
BEGIN
    RETURN QUERY
    SELECT e.user_id, e.event_id, e.cursor, e.recorded_at, sha256(e.frame)
    FROM unnest(users, event_ids) AS w (user_id, event_id)
    JOIN events.events e ON e.user_id = w.user_id AND e.event_id = w.event_id
    WHERE e.run_id IS NULL AND e.recorded_at >= since;
END $$;

REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA events FROM PUBLIC;
GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA events TO netra_events_system;

-- ---------------------------------------------------------------- grants

-- One user at a time: whoever erases is behind the wall of that user.
GRANT INSERT (tenant_id), UPDATE (tenant_id, oldest) ON events.cursors TO netra_events;
GRANT SELECT, DELETE ON events.days TO netra_events;
GRANT DELETE ON events.events, events.steps TO netra_events;
GRANT UPDATE (thread_id, request_id, correlation_id, trace_id, deadline, next_seq, last_digest, last_first_seq, last_cursor, ended,
              terminal_type, erased) ON events.heads TO netra_events;
GRANT SELECT, INSERT (user_id, request_id, asked_by, asked_at, upto, runs), UPDATE (events, done_at) ON events.erasures TO netra_events;

-- Across users: the writer marks days, the sweep drops them.
GRANT INSERT (user_id, tenant_id), UPDATE (last_at, oldest) ON events.cursors TO netra_events_system;
GRANT SELECT, INSERT ON events.days TO netra_events_system;
GRANT SELECT, INSERT, UPDATE ON events.classes TO netra_events_system;
GRANT SELECT (retention, recorded_at) ON events.events TO netra_events_system;
GRANT DELETE ON events.heads, events.steps TO netra_events_system;
GRANT SELECT (user_id, request_id, upto, events, runs, done_at, asked_at) ON events.erasures TO netra_events_system;
