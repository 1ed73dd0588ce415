"""The ledger's tables.

Guarantees: `UNIQUE(event_id)` over all rows for ever (never partition by time), no NULL where a value is
known, every status that the code knows and no other. The signed body is in a table of its own: a status
update then never rewrites it (TOAST would move only bodies of 2 kB and more out of line), and it can expire
while the event id, which dedupes, stays.
"""

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

from firstclaim.status import Status

metadata = MetaData(
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "ck": "%(table_name)s_%(constraint_name)s_check",
        "ix": "%(table_name)s_%(column_0_name)s_idx",
    }
)


# The `doc` of a column is its row in docs/reference/tables.md. It is not written to the database.


def _id(name: str, *, doc: str, primary_key: bool = False, nullable: bool = False) -> Column[str]:
    # Byte order, not the locale's: ids are compared and sorted, never read as words.
    return Column(name, Text(collation="C"), primary_key=primary_key, nullable=nullable, doc=doc)


def _at(name: str, *, doc: str, nullable: bool = False) -> Column[object]:
    return Column(name, DateTime(timezone=True), nullable=nullable, doc=doc)


events = Table(
    "stripe_events",
    metadata,
    _id(
        "event_id",
        primary_key=True,
        doc="Stripe's id of the event: a duplicate is recognised by it. A follow-up has one of ours.",
    ),
    Column(
        "type",
        Text,
        nullable=False,
        doc="The event type, such as `invoice.paid`; of a follow-up, `task:NAME` or `handler:NAME`.",
    ),
    Column("account", Text, doc="The connected account, if it is not your own."),
    Column("livemode", Boolean, nullable=False, doc="Live mode, or test mode."),
    Column("api_version", Text, doc="The API version in which Stripe rendered the event."),
    Column("object_id", Text, doc="The id of the object that the event is about."),
    _at("created_at", doc="Stripe's `created`."),
    Column("status", Text, nullable=False, doc="The state of the event."),
    Column("attempt", Integer, nullable=False, doc="The number of the last attempt, from 1. It only ever rises."),
    Column("failures", Integer, nullable=False, server_default="0", doc="Attempts that failed, since the last replay."),
    Column("abandoned", Integer, nullable=False, server_default="0", doc="Attempts whose process vanished."),
    Column("action", Text, doc="What the handler returned."),
    Column("last_error", Text, doc="The last failure, redacted."),
    _at("received_at", doc="When the event was recorded."),
    _at("due_at", doc="When recovery may take the event; of a claim, when its lease is over."),
    _at("give_up_at", doc="When a failing event becomes `dead`."),
    _at("settled_at", nullable=True, doc="When it became completed, ignored or dead."),
    _at("claimed_at", nullable=True, doc="When it was last claimed."),
    Column("claimed_by", Text, doc="The process that claimed it last: `host:pid`."),
    Column("endpoint", Text, doc="The name of the endpoint that first received it. Null: the one without a name."),
    _id(
        "parent_id",
        nullable=True,
        doc="Of a follow-up: the row whose handler wrote it. Null for an event of Stripe's.",
    ),
    CheckConstraint("status IN ({})".format(", ".join(f"'{each}'" for each in Status)), name="status"),
    CheckConstraint("attempt >= 0 AND failures >= 0 AND abandoned >= 0", name="counts"),
    CheckConstraint("(status IN ('completed', 'ignored', 'dead')) = (settled_at IS NOT NULL)", name="settled"),
    Index(
        "stripe_events_due",
        "due_at",
        postgresql_where=text("status IN ('pending', 'processing', 'failed')"),
    ),
    # For recovery's look, type by type: one index descent costs the same at a million due rows as at ten.
    Index(
        "stripe_events_waiting",
        "type",
        "livemode",
        "due_at",
        postgresql_where=text("status IN ('pending', 'failed') AND abandoned = 0"),
    ),
    Index(
        "stripe_events_waiting_abandoned",
        "type",
        "livemode",
        "due_at",
        postgresql_where=text("status IN ('pending', 'failed') AND abandoned > 0"),
    ),
    # For the follow-ups of an event; it has no row of the others.
    Index("stripe_events_parent", "parent_id", postgresql_where=text("parent_id IS NOT NULL")),
    Index("stripe_events_processing", "due_at", postgresql_where=text("status = 'processing'")),
    Index("stripe_events_give_up", "give_up_at", postgresql_where=text("status IN ('pending', 'failed')")),
    # For lists by time; no rule depends on them. The second has no row of an event that succeeded at once.
    Index("stripe_events_received", "received_at", "event_id"),
    Index(
        "stripe_events_unsuccessful",
        "received_at",
        "event_id",
        postgresql_where=text("status IN ('failed', 'dead')"),
    ),
    info={"about": "One row per event, and one per follow-up."},
)

payloads = Table(
    "stripe_event_payloads",
    metadata,
    _id("event_id", primary_key=True, doc="The event."),
    Column("body", LargeBinary, nullable=False, doc="The bytes that Stripe signed; of a task, what was enqueued."),
    Column("traceparent", Text, doc="The trace of the delivery that recorded the event, if it was traced."),
    Column("headers", Text, doc="Some headers of that delivery: `name: value`, one on a line."),
    Column(
        "received_at",
        DateTime(timezone=True),
        server_default=text("clock_timestamp()"),
        doc="When it was recorded. Null: before schema 0015.",
    ),
    # For pruning: the oldest first. New entries go to its end, which costs little.
    Index("stripe_event_payloads_received", "received_at", "event_id"),
    info={"about": "The signed body, apart from the row: it is deleted sooner, and no change of a status rewrites it."},
)

# See `duplicates.py`.
duplicates = Table(
    "stripe_event_duplicates",
    metadata,
    _id("event_id", primary_key=True, doc="The event."),
    Column("duplicates", BigInteger, nullable=False, doc="How many there were, at least."),
    _at("last_at", doc="When the last of them came."),
    info={"about": "The deliveries of an event after it was recorded, as far as they were counted."},
)

attempts = Table(
    "stripe_event_attempts",
    metadata,
    _id("event_id", primary_key=True, doc="The event."),
    Column("attempt", Integer, primary_key=True, autoincrement=False, doc="The attempt's number."),
    Column("outcome", Text, primary_key=True, doc="`failed`, `dead` or `abandoned`."),
    Column("process", Text, doc="The process that made the attempt: `host:pid`."),
    _at("began_at", nullable=True, doc="When the event was claimed for it."),
    _at("ended_at", doc="When it ended, or was found abandoned."),
    Column("error", Text, nullable=False, doc="The error, redacted."),
    _id("failure_group", nullable=True, doc="The id of its group: handler, class of the error and line."),
    Column("handler", Text, doc="The pattern of the handler."),
    Column("error_class", Text, doc="The class of the error."),
    Column("place", Text, doc="The line of your code that raised it."),
    Index(
        "stripe_event_attempts_group",
        "failure_group",
        "ended_at",
        postgresql_where=text("failure_group IS NOT NULL"),
    ),
    Index("stripe_event_attempts_final", "ended_at", postgresql_where=text("outcome IN ('dead', 'abandoned')")),
    CheckConstraint("outcome IN ('failed', 'dead', 'abandoned')", name="outcome"),
    info={
        "about": "One row for each attempt that did not succeed. The last four columns are null if the process "
        "vanished, or if a build from before schema 0008 wrote the row."
    },
)

epoch = Table(
    "ledger_epoch",
    metadata,
    Column("singleton", Boolean, primary_key=True, server_default=text("true"), doc="Always true: there is one row."),
    Column("id", Uuid, nullable=False, doc="The part of the epoch that `firstclaim epoch rotate` changes."),
    _at("rotated_at", doc="When it was last changed."),
    CheckConstraint("singleton", name="singleton"),
    info={"about": "The epoch, which every marker in Redis contains. A marker of another epoch does not count."},
)

operator_actions = Table(
    "operator_actions",
    metadata,
    Column("action_id", BigInteger, Identity(always=True), primary_key=True, doc="The number of the action."),
    _at("at", doc="When it began."),
    Column(
        "operator",
        Text,
        nullable=False,
        doc="`user@host`, the admin page with a name or an address, or `handler NAME`.",
    ),
    Column("action", Text, nullable=False, doc="What was done: a replay, for example."),
    Column("selection", Text, nullable=False, doc="Which events were selected."),
    Column("changed", BigInteger, doc="How many were changed. Null while it goes on, and if it was interrupted."),
    info={"about": "The audit: what operators changed."},
)

operator_pauses = Table(
    "operator_pauses",
    metadata,
    _id("pattern", primary_key=True, doc="A type, `prefix.*`, `task:NAME`, `handler:NAME` or `*`."),
    Column("operator", Text, nullable=False, doc="Who has paused it: `user@host`, or `handler NAME`."),
    _at("paused_at", doc="Since when."),
    info={"about": "The types whose dispatch operators have paused."},
)

# `events`, `first_at`, `last_at` and `detail` are gathered for the next notice; `content` is the notice that is being
# sent, under its id. See `firstclaim.notify.statements`.
operator_notices = Table(
    "operator_notices",
    metadata,
    Column("topic", Text, primary_key=True, doc="The kind of the notice."),
    _id(
        "subject",
        primary_key=True,
        doc="What it is about, such as a group of failures. The row without a subject "
        "holds in `last_at` how far the dead events have been read.",
    ),
    Column("events", BigInteger, nullable=False, server_default="0", doc="Events gathered for the next notice."),
    _at("first_at", nullable=True, doc="The first of them."),
    _at("last_at", nullable=True, doc="The last of them."),
    Column("detail", JSONB, nullable=False, doc="What the next notice will say."),
    Column("notice_id", Uuid, doc="The notice that is being sent."),
    Column("content", JSONB, doc="Its content."),
    Column("tries", Integer, nullable=False, server_default="0", doc="How often it was sent."),
    _at("due_at", doc="When it may be sent, or sent again."),
    CheckConstraint("(notice_id IS NULL) = (content IS NULL)", name="composed"),
    info={"about": "The notices to operators, one row for each subject."},
)
