-- What a user has since an administrator changed it: told to every process, as what was withdrawn is.
ALTER TABLE auth.revocations
    ADD COLUMN roles text[],
    ADD COLUMN tier text,
    ADD CHECK ((roles IS NULL) = (tier IS NULL) AND (tier IS NULL OR (user_id IS NOT NULL AND NOT security)));

-- what a user's sessions left behind is looked for after they ended, too
CREATE INDEX sessions_of_user ON auth.sessions (user_id, least(expires_at, ended_at));
