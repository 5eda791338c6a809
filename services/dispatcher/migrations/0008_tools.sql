-- Tools that are registered from outside while dispatchers run. They are the platform's, not a user's: the system role alone sees them.
CREATE TABLE dispatcher.tools (
    name           text NOT NULL CHECK (length(name) BETWEEN 1 AND 64),
    version        text NOT NULL,
    digest         text NOT NULL CHECK (length(digest) = 64),
    document       bytea NOT NULL,
    state          text NOT NULL CHECK (state IN ('active', 'replaced', 'removed')),
    revision       bigint NOT NULL,
    registered_by  text NOT NULL,
    registered_at  timestamptz NOT NULL DEFAULT now(),
    changed_by     text NOT NULL,
    changed_at     timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (name, version)
);
COMMENT ON TABLE dispatcher.tools IS 'Every version that was registered: none of them is ever given to another declaration.';
COMMENT ON COLUMN dispatcher.tools.document IS 'netra.dispatcher.v1.Tool.';
COMMENT ON COLUMN dispatcher.tools.revision IS 'The change that the row is from: dispatchers read what is later than they have seen.';
CREATE UNIQUE INDEX tools_active ON dispatcher.tools (name) WHERE state = 'active';
CREATE INDEX tools_changed ON dispatcher.tools (revision);

-- One row. Who changes a tool locks it, so that changes are committed in the order of their numbers and none is missed.
CREATE TABLE dispatcher.tools_head (
    one       boolean PRIMARY KEY DEFAULT true CHECK (one),
    revision  bigint NOT NULL DEFAULT 0
);

ALTER TABLE dispatcher.tools ENABLE ROW LEVEL SECURITY;
ALTER TABLE dispatcher.tools FORCE ROW LEVEL SECURITY;
ALTER TABLE dispatcher.tools_head ENABLE ROW LEVEL SECURITY;
CREATE POLICY system ON dispatcher.tools TO netra_dispatcher_system USING (true) WITH CHECK (true);
CREATE POLICY system ON dispatcher.tools_head TO netra_dispatcher_system USING (true) WITH CHECK (true);
INSERT INTO dispatcher.tools_head DEFAULT VALUES;
-- only now: the owner is under it as well
ALTER TABLE dispatcher.tools_head FORCE ROW LEVEL SECURITY;

GRANT SELECT, INSERT, UPDATE (state, revision, changed_by, changed_at), DELETE ON dispatcher.tools TO netra_dispatcher_system;
GRANT SELECT, UPDATE (revision) ON dispatcher.tools_head TO netra_dispatcher_system;
