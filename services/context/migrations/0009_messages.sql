-- A context is opened with the first message of its run, and closed with the last one: in one round trip and one commit.

-- As before, with a message of each that has one: it is the last of its thread then, or the context is not opened.
CREATE FUNCTION context.open_contexts(
    patience text, context_ids text[], user_ids text[], tenant_ids text[], session_ids text[], thread_ids text[], new_threads boolean[],
    run_ids text[], request_ids text[], connection_ids text[], roles text[], tiers text[], scopes text[], moments timestamptz[],
    deadlines timestamptz[], correlation_ids text[], agent_contexts bytea[], audit_metadata bytea[], asked bytea[], ends timestamptz[],
    actors text[], details text[], message_ids text[], message_requests text[], message_roles text[], contents text[]
) RETURNS text[] LANGUAGE plpgsql AS $$
DECLARE
    one record;
    owner uuid;
    -- how many messages the thread has, and when the new one is said
    before bigint;
    said_at timestamptz;
    outcomes text[] := array_fill('made'::text, ARRAY[cardinality(context_ids)]);
BEGIN
    IF patience <> '' THEN
        PERFORM set_config('lock_timeout', patience, true);
    END IF;
    -- in one order everywhere, that of the locks of audit trails: those who open for the same users do not wait for each other in a circle
    FOR one IN
        SELECT o.* FROM unnest(
            context_ids::uuid[], user_ids::uuid[], tenant_ids::uuid[], session_ids::uuid[], thread_ids::uuid[], new_threads, run_ids::uuid[],
            request_ids, connection_ids::uuid[], roles, tiers, scopes, moments, deadlines, correlation_ids, agent_contexts, audit_metadata,
            asked, ends, actors, details::jsonb[], message_ids::uuid[], message_requests, message_roles, contents
        ) WITH ORDINALITY AS o (
            context_id, user_id, tenant_id, session_id, thread_id, is_new, run_id, request_id, connection_id, roles, tier, scope, created_at,
            deadline, correlation_id, agent_context, audit_metadata, asked, token_until, actor, detail, message_id, message_request,
            message_role, content, place
        ) ORDER BY uuid_hash(o.user_id) & 255, o.user_id, o.request_id, o.place
    LOOP
        PERFORM set_config('netra.user_id', one.user_id::text, true);
        owner := one.user_id;
        before := 0;
        IF NOT one.is_new THEN
            IF one.message_id IS NULL THEN
                -- the lock is that of the foreign key: whoever erases the thread meanwhile is seen
                SELECT t.user_id INTO owner FROM context.threads AS t
                WHERE t.thread_id = one.thread_id AND t.deleted_at IS NULL AND t.erased_at IS NULL
                    AND (t.user_id = one.user_id OR EXISTS (
                        SELECT FROM context.grants AS g WHERE g.thread_id = t.thread_id AND g.grantee_id = one.user_id
                            AND g.access = 'write' AND g.withdrawn_at IS NULL))
                FOR KEY SHARE OF t;
            ELSE
                -- the one of all who write: messages have one order
                SELECT t.user_id, t.messages INTO owner, before FROM context.threads AS t
                WHERE t.thread_id = one.thread_id AND t.deleted_at IS NULL AND t.erased_at IS NULL
                    AND (t.user_id = one.user_id OR EXISTS (
                        SELECT FROM context.grants AS g WHERE g.thread_id = t.thread_id AND g.grantee_id = one.user_id
                            AND g.access = 'write' AND g.withdrawn_at IS NULL))
                FOR NO KEY UPDATE OF t;
            END IF;
            IF owner IS NULL THEN
                -- seen are threads that were granted; those of the user were written to, or are deleted
                outcomes[one.place] := CASE WHEN EXISTS (
                    SELECT FROM context.threads AS t WHERE t.thread_id = one.thread_id AND t.deleted_at IS NULL AND t.erased_at IS NULL
                        AND t.user_id <> one.user_id AND EXISTS (
                            SELECT FROM context.grants AS g WHERE g.thread_id = t.thread_id AND g.grantee_id = one.user_id
                                AND g.withdrawn_at IS NULL)
                ) THEN 'read' ELSE 'none' END;
                CONTINUE;
            END IF;
        END IF;
        said_at := clock_timestamp();
        WITH made AS (
            INSERT INTO context.contexts (context_id, user_id, tenant_id, session_id, thread_id, run_id, request_id, connection_id, roles,
                tier, scope, created_at, deadline, depth, correlation_id, agent_context, audit_metadata, asked, token_until, owner_id)
            VALUES (one.context_id, one.user_id, one.tenant_id, one.session_id, one.thread_id, one.run_id, one.request_id,
                one.connection_id, string_to_array(one.roles, ' '), one.tier, string_to_array(one.scope, ' '), one.created_at, one.deadline,
                0, one.correlation_id, one.agent_context, one.audit_metadata, one.asked, one.token_until, owner)
            ON CONFLICT (user_id, request_id) DO NOTHING
            RETURNING user_id, tenant_id, context_id, thread_id, correlation_id
        ), place AS (
            -- a new thread is counted as it is made
            INSERT INTO context.threads (thread_id, user_id, tenant_id, messages, updated_at)
            SELECT thread_id, user_id, tenant_id, CASE WHEN one.message_id IS NULL THEN 0 ELSE 1 END,
                CASE WHEN one.message_id IS NULL THEN now() ELSE said_at END
            FROM made WHERE one.is_new
        ), said AS (
            INSERT INTO context.messages (user_id, request_id, message_id, thread_id, position, role, content, run_id, created_at, owner_id)
            SELECT user_id, one.message_request, one.message_id, thread_id, before + 1, one.message_role, one.content, one.run_id, said_at,
                owner
            FROM made WHERE one.message_id IS NOT NULL
        )
        INSERT INTO context.audit (user_id, context_id, thread_id, actor, action, correlation_id, detail)
        SELECT user_id, context_id, thread_id, one.actor, 'open', correlation_id, one.detail FROM made;
        IF NOT FOUND THEN
            outcomes[one.place] := 'taken';
        ELSIF one.message_id IS NOT NULL AND NOT one.is_new THEN
            UPDATE context.threads SET messages = before + 1, updated_at = said_at WHERE user_id = owner AND thread_id = one.thread_id;
            IF NOT FOUND THEN
                -- one that is not counted would take the place of all that come later
                RAISE insufficient_privilege USING MESSAGE = 'the thread is not the user''s to write to any more';
            END IF;
        END IF;
    END LOOP;
    PERFORM set_config('netra.user_id', '', true);
    RETURN outcomes;
END
$$;
REVOKE EXECUTE ON FUNCTION context.open_contexts(
    text, text[], text[], text[], text[], text[], boolean[], text[], text[], text[], text[], text[], text[], timestamptz[], timestamptz[],
    text[], bytea[], bytea[], bytea[], timestamptz[], text[], text[], text[], text[], text[], text[]
) FROM public;
GRANT EXECUTE ON FUNCTION context.open_contexts(
    text, text[], text[], text[], text[], text[], boolean[], text[], text[], text[], text[], text[], text[], timestamptz[], timestamptz[],
    text[], bytea[], bytea[], bytea[], timestamptz[], text[], text[], text[], text[], text[], text[]
) TO netra_context;

-- what code that knows of no messages calls, as long as there is some during an upgrade
CREATE OR REPLACE FUNCTION context.open_contexts(
    patience text, context_ids text[], user_ids text[], tenant_ids text[], session_ids text[], thread_ids text[], new_threads boolean[],
    run_ids text[], request_ids text[], connection_ids text[], roles text[], tiers text[], scopes text[], moments timestamptz[],
    deadlines timestamptz[], correlation_ids text[], agent_contexts bytea[], audit_metadata bytea[], asked bytea[], ends timestamptz[],
    actors text[], details text[]
) RETURNS text[] LANGUAGE sql AS $$
    SELECT context.open_contexts(
        patience, context_ids, user_ids, tenant_ids, session_ids, thread_ids, new_threads, run_ids, request_ids, connection_ids, roles,
        tiers, scopes, moments, deadlines, correlation_ids, agent_contexts, audit_metadata, asked, ends, actors, details, '{}', '{}', '{}',
        '{}')
$$;

-- The context `wanted` of a user is closed, and their message the last of its thread. `closed`: it is done, now or before, with the
-- message that there is; `other`: the request id stands for another message; nothing: the context is closed without the message, or the
-- thread is not there for writing. With the rights of who calls it, as the user it is for.
CREATE FUNCTION context.close_with_message(
    whose uuid, wanted uuid, place uuid, run uuid, new_id uuid, said_under text, said_by text, said text, actor text, detail jsonb,
    OUT outcome text, OUT message uuid, OUT closed timestamptz
) LANGUAGE plpgsql AS $$
DECLARE
    owner uuid;
    before bigint;
    said_at timestamptz;
    same boolean;
BEGIN
    PERFORM set_config('netra.user_id', whose::text, true);
    -- the thread first, as all who write; then the context as it is after that wait
    SELECT t.user_id, t.messages INTO owner, before FROM context.threads AS t
    JOIN context.contexts AS c ON c.user_id = whose AND c.context_id = wanted AND c.thread_id = t.thread_id
    WHERE t.thread_id = place AND t.erased_at IS NULL AND c.closed_at IS NULL
        AND (t.user_id = whose OR t.deleted_at IS NULL AND EXISTS (
            SELECT FROM context.grants AS g WHERE g.thread_id = t.thread_id AND g.grantee_id = whose AND g.access = 'write'
                AND g.withdrawn_at IS NULL))
    FOR NO KEY UPDATE OF t FOR NO KEY UPDATE OF c;
    SELECT m.message_id, (m.thread_id, m.role, m.content) = (place, said_by, said) INTO message, same
    FROM context.messages AS m WHERE m.user_id = whose AND m.request_id = said_under;
    IF owner IS NULL THEN
        SELECT c.closed_at INTO closed FROM context.contexts AS c WHERE c.user_id = whose AND c.context_id = wanted;
        IF closed IS NOT NULL AND message IS NOT NULL THEN
            outcome := CASE WHEN same THEN 'closed' ELSE 'other' END;
        END IF;
        RETURN;
    END IF;
    IF NOT same THEN
        outcome := 'other';
        RETURN;
    END IF;
    IF message IS NULL THEN
        message := new_id;
        said_at := clock_timestamp();
        INSERT INTO context.messages (user_id, request_id, message_id, thread_id, position, role, content, run_id, created_at, owner_id)
        VALUES (whose, said_under, new_id, place, before + 1, said_by, said, run, said_at, owner);
        UPDATE context.threads SET messages = before + 1, updated_at = said_at WHERE user_id = owner AND thread_id = place;
        IF NOT FOUND THEN
            -- one that is not counted would take the place of all that come later
            RAISE insufficient_privilege USING MESSAGE = 'the thread is not the user''s to write to any more';
        END IF;
    END IF;
    WITH over AS (
        UPDATE context.contexts SET closed_at = clock_timestamp() WHERE user_id = whose AND context_id = wanted
        RETURNING user_id, context_id, thread_id, correlation_id, closed_at
    ), told AS (
        INSERT INTO context.audit (user_id, context_id, thread_id, actor, action, correlation_id, detail)
        SELECT user_id, context_id, thread_id, close_with_message.actor, 'close', correlation_id,
            close_with_message.detail || jsonb_build_object('message_id', message)
        FROM over
    )
    SELECT closed_at INTO closed FROM over;
    outcome := 'closed';
END
$$;
REVOKE EXECUTE ON FUNCTION context.close_with_message FROM public;
GRANT EXECUTE ON FUNCTION context.close_with_message TO netra_context;

-- The same without a message: when the context `wanted` of a user is closed by this; nothing when it is closed, or not there.
CREATE FUNCTION context.close_context(whose uuid, wanted uuid, actor text, action text, detail jsonb) RETURNS timestamptz
LANGUAGE plpgsql AS $$
DECLARE
    closed timestamptz;
BEGIN
    PERFORM set_config('netra.user_id', whose::text, true);
    WITH over AS (
        UPDATE context.contexts SET closed_at = now() WHERE user_id = whose AND context_id = wanted AND closed_at IS NULL
        RETURNING user_id, context_id, thread_id, correlation_id, closed_at
    ), told AS (
        INSERT INTO context.audit (user_id, context_id, thread_id, actor, action, correlation_id, detail)
        SELECT user_id, context_id, thread_id, close_context.actor, close_context.action, correlation_id, close_context.detail FROM over
    )
    SELECT closed_at INTO closed FROM over;
    RETURN closed;
END
$$;
REVOKE EXECUTE ON FUNCTION context.close_context FROM public;
GRANT EXECUTE ON FUNCTION context.close_context TO netra_context;
