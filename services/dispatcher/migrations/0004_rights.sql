-- What a user has since an administrator changed it while a run of theirs waited or ran.
ALTER TABLE dispatcher.runs
    ADD COLUMN roles text[],
    ADD COLUMN narrowed_at timestamptz,
    ADD CHECK ((roles IS NULL) = (narrowed_at IS NULL));
COMMENT ON COLUMN dispatcher.runs.tier IS 'The tier the run was started in, or that its user has since narrowed_at.';
COMMENT ON COLUMN dispatcher.runs.roles IS 'The roles its user has since narrowed_at; null when nothing was changed.';
GRANT UPDATE (tier, roles, narrowed_at) ON dispatcher.runs TO netra_dispatcher_system;
