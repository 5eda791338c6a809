-- When the message of a run passed which stage, from the edge and back to it: {"message_received": "2026-11-20T20:15:04.123456+00:00", ...}
ALTER TABLE dispatcher.runs ADD COLUMN stages jsonb NOT NULL DEFAULT '{}';
GRANT SELECT (stages), INSERT (stages) ON dispatcher.runs TO netra_dispatcher;
GRANT UPDATE (stages) ON dispatcher.runs TO netra_dispatcher_system;
