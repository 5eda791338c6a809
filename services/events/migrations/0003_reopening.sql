-- Whoever reopens days waits for whoever prepares one: between the look at a constraint and its validation another replica took it away,
-- and the sweep of the first one broke.

CREATE OR REPLACE FUNCTION events.reopen_days(of_class text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '200ms' AS $$
DECLARE
    rest regclass := to_regclass(format('events.%I', 'events_' || of_class || '_rest'));
    closed name;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended('events.events_' || of_class, 0));
    FOR closed IN SELECT c.conname FROM pg_constraint c WHERE c.conrelid = rest AND c.conname ~ '^closed_[0-9]{8}$' LOOP
        EXECUTE format('ALTER TABLE %s DROP CONSTRAINT IF EXISTS %I', rest, closed);
    END LOOP;
END $$;
