-- Until when a run that was put away may wait: until then, and a day more, it needs its steps, however long it says nothing.

ALTER TABLE events.heads ADD COLUMN waits_until timestamptz;

-- those that wait already: they did so for a week at the most, unless told otherwise
ALTER TABLE events.heads NO FORCE ROW LEVEL SECURITY;
UPDATE events.heads h SET waits_until = h.last_at + interval '7 days'
WHERE NOT h.ended AND EXISTS (
    SELECT FROM events.events e
    WHERE e.user_id = h.user_id AND e.cursor = h.last_cursor AND e.run_id = h.run_id AND e.type = 'agent_suspended');
ALTER TABLE events.heads FORCE ROW LEVEL SECURITY;

GRANT INSERT (waits_until), UPDATE (waits_until) ON events.heads TO netra_events_system;
GRANT UPDATE (waits_until) ON events.heads TO netra_events;
