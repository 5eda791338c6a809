-- Lines of an audit trail are read page by page: what is behind a page that was read stays as it is.

-- Ids are given before the commit. Who adds a line is told of by a lock of its user until then; who reads a page with another one behind it
-- waits until nobody holds it, and so sees every line that has a lower id than its last one. Of users there are 256 kinds: one transaction
-- may close contexts of any number of them, and locks are few.
CREATE FUNCTION context.number_line() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(6, uuid_hash(NEW.user_id) & 255);
    -- the one that was given with the row is older than the lock
    NEW.id := nextval('context.audit_id_seq');
    RETURN NEW;
END
$$;
CREATE TRIGGER numbered BEFORE INSERT ON context.audit FOR EACH ROW EXECUTE FUNCTION context.number_line();
GRANT USAGE ON SEQUENCE context.audit_id_seq TO netra_context, netra_context_system;

-- A thread is counted by the message that was added to it, and by nothing else, whoever may write to it.
CREATE FUNCTION context.require_message() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.messages <> OLD.messages + 1 OR NOT EXISTS (
        SELECT FROM context.messages AS m WHERE m.thread_id = NEW.thread_id AND m.position = NEW.messages AND m.created_at = NEW.updated_at
    ) THEN
        RAISE insufficient_privilege USING MESSAGE = 'a thread is counted by its messages';
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER counted BEFORE UPDATE OF messages, updated_at ON context.threads FOR EACH ROW
    WHEN (NEW.messages <> OLD.messages OR NEW.updated_at <> OLD.updated_at) EXECUTE FUNCTION context.require_message();

-- Messages in threads of others stay as places, and nothing is left of them when their author had everything erased: a few at a time, as
-- they may be many. Who removes what is left over sees those of such authors, and does nothing else with them.
CREATE INDEX messages_to_blank ON context.messages (user_id) WHERE user_id <> owner_id AND erased_at IS NULL;
CREATE POLICY everything ON context.messages FOR SELECT TO netra_context_system
    USING (user_id <> owner_id AND EXISTS (
        SELECT FROM context.changes AS c WHERE c.user_id = messages.user_id AND c.asked = 'erase everything' AND c.done_at IS NULL));
CREATE POLICY emptied ON context.messages FOR UPDATE TO netra_context_system
    USING (user_id <> owner_id AND EXISTS (
        SELECT FROM context.changes AS c WHERE c.user_id = messages.user_id AND c.asked = 'erase everything' AND c.done_at IS NULL))
    WITH CHECK (erased_at IS NOT NULL);
-- what was granted to them since then is a new beginning
CREATE POLICY since ON context.grants FOR SELECT TO netra_context_system
    USING (EXISTS (
        SELECT FROM context.changes AS c WHERE c.user_id = grants.grantee_id AND c.asked = 'erase everything' AND c.done_at IS NULL));
GRANT SELECT (user_id, owner_id, message_id, created_at, erased_at), UPDATE (content, request_id, erased_at)
    ON context.messages TO netra_context_system;
GRANT SELECT (grantee_id, created_at) ON context.grants TO netra_context_system;
