"""The templates of the SQL that writes objects from Clerk. ``statements`` explains them."""

from clerkhooks.clerk.events import LAST_MILLISECOND

# Clerk never reuses an id, so a tombstone from a deletion event is final. A tombstone from a sync
# has a version, which contains the time of the sync. Newer data from Clerk restores the row.
IS_FINAL = "t.deleted_at IS NOT NULL AND t.version_updated_at IS NULL"

UPSERT = """
INSERT INTO {table} AS t
    ({columns}, created_at, updated_at {own_columns})
SELECT {columns}, :now, :now {own_values}
FROM r
WHERE {is_new}
ORDER BY id  -- one order in every transaction, so that two writers never deadlock
ON CONFLICT (id) DO UPDATE SET
    {changes},
    updated_at = excluded.updated_at
WHERE {if_known}{may_change}{end_if}
RETURNING {returned}
"""

# A redelivered message neither waits for the object's row nor locks it. This condition uses
# count(*), because PostgreSQL might turn EXISTS into a join that reads the whole log.
IS_NEW = """id IS NOT NULL AND (
        SELECT count(*) FROM {messages} AS m
        WHERE m.message_id = r.message_id AND m.outcome <> 'failed') = 0"""

EVENT_WINS = """
        excluded.deleted_at IS NOT NULL
        OR t.version_updated_at IS NULL
        OR (t.version_updated_at, t.version_timestamp, t.version_message_id)
         < (excluded.version_updated_at, excluded.version_timestamp, excluded.version_message_id)"""

# If the Backend API returns an object, it exists, unless a sync wrote a tombstone after :read_at
# (the time before the request).
SNAPSHOT_WINS = f"""((t.deleted_at IS NOT NULL AND t.version_updated_at < :read_at)
        OR {EVENT_WINS})"""

# Each message is processed once. The retry of a failed message updates its row.
RECORD_MESSAGES = """
INSERT INTO {messages} AS m
    (message_id, event_type, clerk_user_id, clerk_object_id, outcome, attempts,
     occurred_at, received_at, processed_at)
SELECT message_id, event_type, {user_id}, {object_id}, {outcome}, 1, occurred_at, :now, :now
FROM r
WHERE true
ORDER BY message_id
ON CONFLICT (message_id) DO UPDATE SET
    outcome = excluded.outcome, attempts = m.attempts + 1, processed_at = excluded.processed_at,
    error = NULL
WHERE m.outcome = 'failed'
RETURNING message_id, outcome
"""

# With a change feed, the rows are locked and read before they are written.
LOCK = """
SELECT r.id AS sought, {state_of_t}
FROM (SELECT id FROM ({id_rows}) AS r ORDER BY id {offset}) AS r
    LEFT JOIN {locked_table_of_r} ON t.id = r.id
"""

LOCK_FOR_EVENTS = """
WITH r AS ({message_rows})
SELECT r.id AS sought, {state_of_t}
FROM (SELECT id FROM r WHERE {is_new} ORDER BY id {offset}) AS r
    LEFT JOIN {locked_table_of_r} ON t.id = r.id
"""

# A row that is inserted after the others were locked is left, because its old values are unknown.
IS_KNOWN = "t.id IN (SELECT json_array_elements_text(CAST(:known AS json))) AND ("

APPLY_ON_POSTGRESQL = """
WITH r AS (
    -- The lock timeout is set here, for this transaction only, without another round trip.
    SELECT r.* FROM (SELECT set_config('lock_timeout', :lock_timeout, true)) AS limits,
        json_to_recordset(CAST(:rows AS json)) AS r ({typed_columns})),
changed AS ({upsert})
{record_messages}
"""

RECORD_FAILURE = """
INSERT INTO {messages} AS m
    (message_id, event_type, clerk_user_id, clerk_object_id, outcome, attempts,
     occurred_at, received_at, error)
VALUES (:message_id, :event_type, :user_id, :object_id, 'failed', 1, :occurred_at, :now, :error)
ON CONFLICT (message_id) DO UPDATE SET attempts = m.attempts + 1, error = excluded.error
WHERE m.outcome = 'failed'
RETURNING message_id
"""

# Rows that already have Clerk's newest version are left out, unless a declared column is NULL, or
# the state differs: Clerk does not document that every change of it moves updated_at.
COMPARE = """
SELECT r.id AS sought, {state_of_t}
FROM ({compared_rows}) AS r LEFT JOIN {table_of_r} ON t.id = r.id
WHERE (t.version_updated_at = r.version_updated_at) IS NOT TRUE
    OR t.deleted_at IS NOT NULL
    OR {state_differs}
    {or_declared_is_null}
"""

# A newly declared column is NULL even in rows that already have Clerk's newest version.
FILL_DECLARED = """
WITH r AS ({snapshot_rows})
UPDATE {table} AS t SET {declared_from_r}, updated_at = :now
FROM r
WHERE t.id = r.id AND t.deleted_at IS NULL AND t.version_updated_at = r.version_updated_at
    AND ({declared_is_missing})
RETURNING {updated}
"""

TOMBSTONE = """
UPDATE {table} SET
    {erased}, deleted_at = :now, updated_at = :now, {version}
WHERE id IN (
    SELECT t.id FROM {table} AS t
    WHERE t.id IN (SELECT id FROM ({id_rows}) AS r) AND {condition}
    ORDER BY t.id {for_update})
RETURNING {returned}
"""

# The tombstone ranks above every update before the sync. A later event restores the row.
INFERRED = {
    "version": f"""
    version_updated_at = :found_at, version_timestamp = {LAST_MILLISECOND}, version_message_id = ''
    """,
    "condition": """t.deleted_at IS NULL AND t.created_at < :created_before
        AND (t.version_updated_at IS NULL OR t.version_updated_at <= :found_at)""",
}
FINAL = {
    "version": "version_updated_at = NULL, version_timestamp = NULL, version_message_id = NULL",
    "condition": f"NOT ({IS_FINAL})",
}
