-- Contexts are opened many at a time, in one round trip and one commit. Each is opened as the user it is for: the walls are theirs.

-- What became of each: `made`; `taken`, as its request id is; `none`, as there is no such thread for its user; `read`, as there is one which
-- they may only read. Whoever calls this is held up by others no longer than `patience`, which is as the setting lock_timeout has it; empty,
-- for as long as it is.
-- With the rights of who calls it, under the same policies as every statement of theirs: it sets the user whom those look at, and nothing more.
CREATE FUNCTION context.open_contexts(
    patience text, context_ids text[], user_ids text[], tenant_ids text[], session_ids text[], thread_ids text[], new_threads boolean[],
    run_ids text[], request_ids text[], connection_ids text[], roles text[], tiers text[], scopes text[], moments timestamptz[],
    deadlines timestamptz[], correlation_ids text[], agent_contexts bytea[], audit_metadata bytea[], asked bytea[], ends timestamptz[],
    actors text[], details text[]
) RETURNS text[] LANGUAGE plpgsql AS $$
DECLARE
    one record;
    owner uuid;
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
            asked, ends, actors, details::jsonb[]
        ) WITH ORDINALITY AS o (
            context_id, user_id, tenant_id, session_id, thread_id, is_new, run_id, request_id, connection_id, roles, tier, scope, created_at,
            deadline, correlation_id, agent_context, audit_metadata, asked, token_until, actor, detail, place
        ) ORDER BY uuid_hash(o.user_id) & 255, o.user_id, o.request_id, o.place
    LOOP
        PERFORM set_config('netra.user_id', one.user_id::text, true);
        owner := one.user_id;
        IF NOT one.is_new THEN
            -- the lock is that of the foreign key: whoever erases the thread meanwhile is seen
            SELECT t.user_id INTO owner FROM context.threads AS t
            WHERE t.thread_id = one.thread_id AND t.deleted_at IS NULL AND t.erased_at IS NULL
                AND (t.user_id = one.user_id OR EXISTS (
                    SELECT FROM context.grants AS g WHERE g.thread_id = t.thread_id AND g.grantee_id = one.user_id
                        AND g.access = 'write' AND g.withdrawn_at IS NULL))
            FOR KEY SHARE OF t;
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
        WITH made AS (
            INSERT INTO context.contexts (context_id, user_id, tenant_id, session_id, thread_id, run_id, request_id, connection_id, roles,
                tier, scope, created_at, deadline, depth, correlation_id, agent_context, audit_metadata, asked, token_until, owner_id)
            VALUES (one.context_id, one.user_id, one.tenant_id, one.session_id, one.thread_id, one.run_id, one.request_id,
                one.connection_id, string_to_array(one.roles, ' '), one.tier, string_to_array(one.scope, ' '), one.created_at, one.deadline,
                0, one.correlation_id, one.agent_context, one.audit_metadata, one.asked, one.token_until, owner)
            ON CONFLICT (user_id, request_id) DO NOTHING
            RETURNING user_id, tenant_id, context_id, thread_id, correlation_id
        ), place AS (
            INSERT INTO context.threads (thread_id, user_id, tenant_id) SELECT thread_id, user_id, tenant_id FROM made WHERE one.is_new
        )
        INSERT INTO context.audit (user_id, context_id, thread_id, actor, action, correlation_id, detail)
        SELECT user_id, context_id, thread_id, one.actor, 'open', correlation_id, one.detail FROM made;
        IF NOT FOUND THEN
            outcomes[one.place] := 'taken';
        END IF;
    END LOOP;
    PERFORM set_config('netra.user_id', '', true);
    RETURN outcomes;
END
$$;
REVOKE EXECUTE ON FUNCTION context.open_contexts FROM public;
GRANT EXECUTE ON FUNCTION context.open_contexts TO netra_context;
