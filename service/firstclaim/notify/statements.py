"""The SQL of notices: what is gathered for each subject, and what is sent of it.

Guarantees: there is one row for each subject (a group of failures, a handler, a kind of refusal), however many events
it counts and however long the receiver is unreachable. What is gathered is never what is being sent: `content` is
composed once, under its id, and events that come later count for the next notice. No row of an event is changed.
"""

from firstclaim.inbox.statements import ABANDONED_BEFORE
from firstclaim.postgres.statement import statement

# The reading position in the attempts that made an event dead: from the first start with an address on.
BEGIN = statement("""
INSERT INTO firstclaim.operator_notices (topic, subject, last_at, detail, due_at)
VALUES ('event_dead', '', clock_timestamp(), '{}', clock_timestamp())
ON CONFLICT DO NOTHING
""")

# Events that became dead since the last look, whichever process or build made them so. The row of the position is
# locked, so one process reads at a time, and each attempt is read once. An attempt is visible when its COMMIT ends, and
# `ended_at` is from before, so the newest are left to the next look. An abandoned attempt has made its event dead if
# none has followed. An attempt of no handler counts for its type.
GATHER_DEAD = statement("""
WITH reached AS MATERIALIZED (
    SELECT greatest(last_at, clock_timestamp() - interval '7 days') AS after FROM firstclaim.operator_notices
     WHERE topic = 'event_dead' AND subject = ''
       FOR UPDATE SKIP LOCKED
), dead AS MATERIALIZED (
    SELECT a.*, e.type, a.outcome = 'dead' OR e.status = 'dead' AND e.attempt = a.attempt AS counts
      FROM reached CROSS JOIN LATERAL (
        SELECT * FROM firstclaim.stripe_event_attempts
         WHERE outcome IN ('dead', 'abandoned') AND ended_at > reached.after
           AND ended_at <= (SELECT clock_timestamp()) - make_interval(secs => :settled)
         ORDER BY ended_at FETCH FIRST (CAST(:limit AS int)) ROWS WITH TIES) AS a
     CROSS JOIN LATERAL (
           SELECT type, status, attempt FROM firstclaim.stripe_events e WHERE e.event_id = a.event_id LIMIT 1) AS e
), grouped AS (
    SELECT coalesce(failure_group, 'type ' || type) AS subject, count(*) AS events,
           min(ended_at) AS first_at, max(ended_at) AS last_at,
           jsonb_build_object(
               'kind', 'event_dead', 'group', min(failure_group), 'handler', min(handler),
               'error_class', min(error_class), 'place', min(place), 'type', min(type),
               'example_id', (array_agg(event_id ORDER BY ended_at DESC))[1]) AS detail
      FROM dead WHERE counts GROUP BY 1
), moved AS (
    UPDATE firstclaim.operator_notices SET last_at = (SELECT max(ended_at) FROM dead)
     WHERE topic = 'event_dead' AND subject = '' AND EXISTS (SELECT FROM dead)
), written AS (
    INSERT INTO firstclaim.operator_notices AS n (topic, subject, events, first_at, last_at, detail, due_at)
    SELECT 'event_dead', subject, events, first_at, last_at, detail, clock_timestamp() FROM grouped
    ON CONFLICT (topic, subject) DO UPDATE
       SET events = n.events + excluded.events, first_at = coalesce(n.first_at, excluded.first_at),
           last_at = excluded.last_at, detail = excluded.detail
)
SELECT count(*) FROM dead
""")

# Events that wait for a retry because their handler failed: of each type, among those that are due last, because what
# has just been recorded is due before them. A retry that the handler asked for has no group. (The type is compared with
# the time, as one row: for two equalities, the planner may walk over all events of the other types, in order of time.)
FAILING = {
    abandoned: statement(f"""
SELECT last.handler, last.error_class, last.place, last.failure_group AS "group", e.event_id, e.type, first.since,
       first.since <= (SELECT clock_timestamp()) - make_interval(secs => :for_seconds) AS lasting
  FROM unnest(CAST(:types AS text[]), CAST(:livemodes AS bool[])) AS queue (type, livemode)
 CROSS JOIN LATERAL (
       SELECT event_id, status, type, livemode FROM firstclaim.stripe_events waiting
        WHERE (waiting.type, waiting.livemode, waiting.due_at) <= (queue.type, queue.livemode, 'infinity')
          AND status IN ('pending', 'failed') AND {condition}
        ORDER BY waiting.type DESC, waiting.livemode DESC, waiting.due_at DESC LIMIT :limit) AS e
 CROSS JOIN LATERAL (
       SELECT handler, error_class, place, failure_group FROM firstclaim.stripe_event_attempts a
        WHERE a.event_id = e.event_id ORDER BY attempt DESC, ended_at DESC LIMIT 1) AS last
 CROSS JOIN LATERAL (
       SELECT min(ended_at) AS since FROM firstclaim.stripe_event_attempts a WHERE a.event_id = e.event_id) AS first
 WHERE e.type = queue.type AND e.livemode = queue.livemode
   AND e.status = 'failed' AND last.failure_group IS NOT NULL
""")
    for abandoned, condition in ABANDONED_BEFORE.items()
}

# A handler fails: a notice if it did not before, otherwise only the events by which its recovery is seen.
BEGINS_TO_FAIL = statement("""
INSERT INTO firstclaim.operator_notices AS n (topic, subject, events, first_at, last_at, detail, due_at)
VALUES ('handler', :handler, 1, :since, clock_timestamp(), CAST(:detail AS jsonb), clock_timestamp())
ON CONFLICT (topic, subject) DO UPDATE
   SET events = CASE n.detail ->> 'kind' WHEN 'handler_failing' THEN n.events ELSE 1 END,
       first_at = CASE n.detail ->> 'kind' WHEN 'handler_failing' THEN n.first_at ELSE excluded.first_at END,
       last_at = excluded.last_at,
       detail = CASE n.detail ->> 'kind' WHEN 'handler_failing'
                     THEN n.detail || jsonb_build_object('watched', excluded.detail -> 'watched')
                     ELSE excluded.detail END
""")

# A handler fails no longer: none of its events waits for a retry, and those that did are settled. It has recovered if
# one of them is completed; if all are dead, they are reported as such. A notice of its failing that was not composed
# yet becomes this one, which says since when it failed.
RECOVERS = statement("""
UPDATE firstclaim.operator_notices n
   SET detail = detail || jsonb_build_object(
           'kind', CASE WHEN ended.completed THEN 'handler_recovered' ELSE 'handler_ended' END),
       events = CASE WHEN ended.completed THEN 1 ELSE 0 END, last_at = clock_timestamp()
  FROM (SELECT subject, coalesce(bool_or(e.status IN ('pending', 'processing', 'failed')), false) AS unsettled,
               coalesce(bool_or(e.status = 'completed'), false) AS completed
          FROM firstclaim.operator_notices
         CROSS JOIN LATERAL jsonb_array_elements_text(detail -> 'watched') AS watched (event_id)
          LEFT JOIN firstclaim.stripe_events e ON e.event_id = watched.event_id
         WHERE topic = 'handler' AND detail ->> 'kind' = 'handler_failing' AND subject <> ALL(CAST(:failing AS text[]))
         GROUP BY subject) AS ended
 WHERE n.topic = 'handler' AND n.subject = ended.subject AND n.detail ->> 'kind' = 'handler_failing'
   AND NOT ended.unsettled
RETURNING n.subject
""")

# Requests that this process refused because of their signature, added to those of the other processes. Endpoints: those
# of the requests that have not been reported.
REFUSED = statement("""
INSERT INTO firstclaim.operator_notices AS n (topic, subject, events, first_at, last_at, detail, due_at)
VALUES ('signatures', :reason, :requests, clock_timestamp(), clock_timestamp(),
        jsonb_build_object('kind', 'signatures_refused', 'reason', CAST(:reason AS text),
                           'endpoints', CAST(:endpoints AS text[])), clock_timestamp())
ON CONFLICT (topic, subject) DO UPDATE
   SET events = n.events + excluded.events, first_at = coalesce(n.first_at, excluded.first_at),
       last_at = excluded.last_at,
       detail = excluded.detail || CASE WHEN n.events > 0 THEN jsonb_build_object('endpoints', (
           SELECT coalesce(jsonb_agg(DISTINCT endpoint), '[]')
             FROM jsonb_array_elements(coalesce(n.detail -> 'endpoints', '[]') || (excluded.detail -> 'endpoints'))
                  AS endpoint)) ELSE '{}' END
""")

# The next notice to send, composed now, or composed before and not known to be sent. It is due again after a while, in
# case this process vanishes meanwhile: it is sent at least once, and its id says that it is the same. The topic of
# which this process has sent nothing for longest comes first: a thousand groups of dead events delay no other notice.
TAKE = statement("""
WITH due AS MATERIALIZED (
    SELECT topic, subject FROM firstclaim.operator_notices
     WHERE due_at <= (SELECT clock_timestamp()) AND (content IS NOT NULL OR events > 0)
     ORDER BY array_position(CAST(:topics AS text[]), topic), due_at LIMIT 1 FOR UPDATE SKIP LOCKED
)
UPDATE firstclaim.operator_notices n
   SET notice_id = coalesce(notice_id, gen_random_uuid()),
       content = coalesce(content, (detail - 'watched') || jsonb_build_object(
           'events', events, 'first_at', first_at, 'last_at', last_at)),
       events = CASE WHEN content IS NULL THEN 0 ELSE events END,
       first_at = CASE WHEN content IS NULL AND n.topic <> 'handler' THEN NULL ELSE first_at END,
       tries = tries + 1, due_at = clock_timestamp() + make_interval(secs => :lease)
  FROM due WHERE n.topic = due.topic AND n.subject = due.subject
RETURNING n.topic, notice_id::text AS notice_id, content::text AS content, tries
""")

SENT = statement("""
UPDATE firstclaim.operator_notices
   SET notice_id = NULL, content = NULL, tries = 0, due_at = clock_timestamp() + make_interval(secs => :quiet)
 WHERE notice_id = CAST(CAST(:notice_id AS text) AS uuid)
""")
POSTPONED = statement("""
UPDATE firstclaim.operator_notices SET due_at = clock_timestamp() + make_interval(secs => :wait)
 WHERE notice_id = CAST(CAST(:notice_id AS text) AS uuid)
""")

# Forget subjects of which nothing was sent for a week, so that there are no more rows than subjects.
FORGET = statement("""
DELETE FROM firstclaim.operator_notices
 WHERE subject <> '' AND events = 0 AND content IS NULL AND due_at < clock_timestamp() - interval '7 days'
   AND detail ->> 'kind' <> 'handler_failing'
""")
