-- The writer opens a run together with its first append: it makes the head as that append leaves it.

GRANT INSERT (run_id, user_id, thread_id, request_id, correlation_id, trace_id, retention, deadline, created_at, epoch, next_seq, last_digest,
              last_first_seq, last_cursor, last_at, ended, terminal_type)
    ON events.heads TO netra_events_system;
