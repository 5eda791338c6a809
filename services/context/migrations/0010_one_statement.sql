-- Contexts that are opened together are stored by one statement: its beginning and its end cost as much as three rows of it.

-- As before: each as the user it is for, behind that user's walls. As many as there are, unless a thread of somebody else is among them.
CREATE OR REPLACE FUNCTION context.open_contexts(
    patience text, context_ids text[], user_ids text[], tenant_ids text[], session_ids text[], thread_ids text[], new_threads boolean[],
    run_ids text[], request_ids text[], connection_ids text[], roles text[], tiers text[], scopes text[], moments timestamptz[],
    deadlines timestamptz[], correlation_ids text[], agent_contexts bytea[], audit_metadata bytea[], asked bytea[], ends timestamptz[],
    actors text[], details text[], message_ids text[], message_requests text[], message_roles text[], contents text[]
) RETURNS text[] LANGUAGE plpgsql AS $$
DECLARE
    one record;
    owner uuid;
    before bigint;
    said_at timestamptz;
    -- by their places: whose the threads are, how many messages they have, and what became of each
    owners uuid[] := user_ids::uuid[];
    befores bigint[] := array_fill(0::bigint, ARRAY[cardinality(context_ids)]);
    outcomes text[] := array_fill('taken'::text, ARRAY[cardinality(context_ids)]);
    -- the places that are stored by one statement each; null is all
    alone bigint;
    stored bigint[];
    at bigint;
    each bigint[] := ARRAY[NULL::bigint];
BEGIN
    IF patience <> '' THEN
        PERFORM set_config('lock_timeout', patience, true);
    END IF;
    IF false = ANY (new_threads) THEN
        FOR one IN
            SELECT o.user_id, o.thread_id::uuid, o.message_id IS NOT NULL AS says, o.place
            FROM unnest(user_ids::uuid[], thread_ids, request_ids, new_threads, message_ids) WITH ORDINALITY
                AS o (user_id, thread_id, request_id, is_new, message_id, place)
            WHERE NOT o.is_new ORDER BY uuid_hash(o.user_id) & 255, o.user_id, o.request_id, o.place
        LOOP
            PERFORM set_config('netra.user_id', one.user_id::text, true);
            IF one.says THEN
                -- the lock of all who write: messages have one order
                SELECT t.user_id, t.messages INTO owner, before FROM context.threads AS t
                WHERE t.thread_id = one.thread_id AND t.deleted_at IS NULL AND t.erased_at IS NULL
                    AND (t.user_id = one.user_id OR EXISTS (
                        SELECT FROM context.grants AS g WHERE g.thread_id = t.thread_id AND g.grantee_id = one.user_id
                            AND g.access = 'write' AND g.withdrawn_at IS NULL))
                FOR NO KEY UPDATE OF t;
                befores[one.place] := before;
            ELSE
                -- the one of the foreign key: whoever erases the thread meanwhile is seen
                SELECT t.user_id INTO owner FROM context.threads AS t
                WHERE t.thread_id = one.thread_id AND t.deleted_at IS NULL AND t.erased_at IS NULL
                    AND (t.user_id = one.user_id OR EXISTS (
                        SELECT FROM context.grants AS g WHERE g.thread_id = t.thread_id AND g.grantee_id = one.user_id
                            AND g.access = 'write' AND g.withdrawn_at IS NULL))
                FOR KEY SHARE OF t;
            END IF;
            owners[one.place] := owner;
            IF owner IS NULL THEN
                -- seen are threads that were granted; those of the user were written to, or are deleted
                outcomes[one.place] := CASE WHEN EXISTS (
                    SELECT FROM context.threads AS t WHERE t.thread_id = one.thread_id AND t.deleted_at IS NULL AND t.erased_at IS NULL
                        AND t.user_id <> one.user_id AND EXISTS (
                            SELECT FROM context.grants AS g WHERE g.thread_id = t.thread_id AND g.grantee_id = one.user_id
                                AND g.withdrawn_at IS NULL)
                ) THEN 'read' ELSE 'none' END;
            ELSIF owner <> one.user_id THEN
                -- a statement may ask for the grants of a user once for all of its rows, which are of many users
                SELECT array_agg(o.place ORDER BY uuid_hash(o.user_id) & 255, o.user_id, o.request_id, o.place) INTO each
                FROM unnest(user_ids::uuid[], request_ids) WITH ORDINALITY AS o (user_id, request_id, place);
            END IF;
        END LOOP;
    END IF;
    said_at := clock_timestamp();
    FOREACH alone IN ARRAY each LOOP
        -- the wall is set to the user of each row as that row comes to it: nothing is stored for another one
        WITH given AS (
            SELECT o.*, owners[o.place] AS owner_id,
                row_number() OVER (ORDER BY uuid_hash(o.user_id::uuid) & 255, o.user_id::uuid, o.request_id, o.place) AS turn
            FROM unnest(
                context_ids, user_ids, tenant_ids, session_ids, thread_ids, new_threads, run_ids, request_ids, connection_ids, roles, tiers,
                scopes, moments, deadlines, correlation_ids, agent_contexts, audit_metadata, asked, ends, actors, details, message_ids,
                message_requests, message_roles, contents
            ) WITH ORDINALITY AS o (
                context_id, user_id, tenant_id, session_id, thread_id, is_new, run_id, request_id, connection_id, roles, tier, scope,
                created_at, deadline, correlation_id, agent_context, audit_metadata, asked, token_until, actor, detail, message_id,
                message_request, message_role, content, place
            ) WHERE owners[o.place] IS NOT NULL AND (alone IS NULL OR o.place = alone)
        ), made AS (
            INSERT INTO context.contexts (context_id, user_id, tenant_id, session_id, thread_id, run_id, request_id, connection_id, roles,
                tier, scope, created_at, deadline, depth, correlation_id, agent_context, audit_metadata, asked, token_until, owner_id)
            SELECT g.context_id::uuid, set_config('netra.user_id', g.user_id, true)::uuid, g.tenant_id::uuid, g.session_id::uuid,
                g.thread_id::uuid, g.run_id::uuid, g.request_id, g.connection_id::uuid, string_to_array(g.roles, ' '), g.tier,
                coalesce(string_to_array(g.scope, ' '), '{}'), g.created_at, g.deadline, 0, g.correlation_id, g.agent_context,
                g.audit_metadata, g.asked, g.token_until, g.owner_id
            FROM (SELECT * FROM given ORDER BY turn) AS g
            ON CONFLICT (user_id, request_id) DO NOTHING
            RETURNING context_id
        ), opened AS (
            SELECT g.* FROM made JOIN given AS g ON g.context_id::uuid = made.context_id
        ), place AS (
            -- a new thread is counted as it is made
            INSERT INTO context.threads (thread_id, user_id, tenant_id, messages, updated_at)
            SELECT thread_id::uuid, set_config('netra.user_id', user_id, true)::uuid, tenant_id::uuid,
                CASE WHEN message_id IS NULL THEN 0 ELSE 1 END, CASE WHEN message_id IS NULL THEN now() ELSE said_at END
            FROM opened WHERE is_new
        ), said AS (
            INSERT INTO context.messages (user_id, request_id, message_id, thread_id, position, role, content, run_id, created_at, owner_id)
            SELECT set_config('netra.user_id', s.user_id, true)::uuid, s.message_request, s.message_id::uuid, s.thread_id::uuid,
                befores[s.place] + s.nth, s.message_role, s.content, s.run_id::uuid, said_at, s.owner_id
            FROM (SELECT *, row_number() OVER (PARTITION BY thread_id ORDER BY turn) AS nth FROM opened WHERE message_id IS NOT NULL) AS s
        ), told AS (
            INSERT INTO context.audit (user_id, context_id, thread_id, actor, action, correlation_id, detail)
            SELECT set_config('netra.user_id', o.user_id, true)::uuid, o.context_id::uuid, o.thread_id::uuid, o.actor, 'open',
                o.correlation_id, o.detail::jsonb
            FROM (SELECT * FROM opened ORDER BY turn) AS o
        )
        SELECT array_agg(o.place) INTO stored FROM opened AS o;
        FOREACH at IN ARRAY coalesce(stored, '{}') LOOP
            outcomes[at] := 'made';
            IF alone IS NOT NULL AND message_ids[at] IS NOT NULL THEN
                -- the next one in this thread comes after it
                SELECT array_agg(b.messages + (thread_ids[b.place] = thread_ids[at])::int ORDER BY b.place) INTO befores
                FROM unnest(befores) WITH ORDINALITY AS b (messages, place);
            END IF;
        END LOOP;
    END LOOP;
    IF false = ANY (new_threads) THEN
        FOR one IN
            SELECT o.* FROM unnest(user_ids, owners, thread_ids::uuid[], new_threads, message_ids, outcomes) WITH ORDINALITY
                AS o (user_id, owner_id, thread_id, is_new, message_id, outcome, place)
            WHERE o.message_id IS NOT NULL AND NOT o.is_new AND o.outcome = 'made'
        LOOP
            PERFORM set_config('netra.user_id', one.user_id, true);
            UPDATE context.threads SET messages = messages + 1, updated_at = said_at
            WHERE user_id = one.owner_id AND thread_id = one.thread_id;
            IF NOT FOUND THEN
                -- one that is not counted would take the place of all that come later
                RAISE insufficient_privilege USING MESSAGE = 'the thread is not the user''s to write to any more';
            END IF;
        END LOOP;
    END IF;
    PERFORM set_config('netra.user_id', '', true);
    RETURN outcomes;
END
$$;
