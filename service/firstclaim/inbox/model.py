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

from firstclaim.status import Status

metadata = MetaData(
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "ck": "%(table_name)s_%(constraint_name)s_check",
        "ix": "%(table_name)s_%(column_0_name)s_idx",
    }
)


def _id(name: str, *, primary_key: bool = False, nullable: bool = False) -> Column[str]:
    # Byte order, not the locale's: ids are compared and sorted, never read as words.
    return Column(name, Text(collation="C"), primary_key=primary_key, nullable=nullable)


def _at(name: str, *, nullable: bool = False) -> Column[object]:
    return Column(name, DateTime(timezone=True), nullable=nullable)


events = Table(
    "stripe_events",
    metadata,
    _id("event_id", primary_key=True),
    Column("type", Text, nullable=False),
    Column("account", Text),
    Column("livemode", Boolean, nullable=False),
    Column("api_version", Text),
    Column("object_id", Text),
    _at("created_at"),  # Stripe's `created`
    Column("status", Text, nullable=False),
    Column("attempt", Integer, nullable=False),  # the fencing token: only ever rises
    Column("failures", Integer, nullable=False, server_default="0"),
    Column("abandoned", Integer, nullable=False, server_default="0"),
    Column("action", Text),
    Column("last_error", Text),
    _at("received_at"),
    _at("due_at"),
    _at("give_up_at"),
    _at("settled_at", nullable=True),
    _at("claimed_at", nullable=True),  # the last claim
    Column("claimed_by", Text),  # host:pid
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
)

payloads = Table(
    "stripe_event_payloads",
    metadata,
    _id("event_id", primary_key=True),
    Column("body", LargeBinary, nullable=False),
)

# Of each attempt that did not succeed: `outcome` is failed, dead or abandoned.
attempts = Table(
    "stripe_event_attempts",
    metadata,
    _id("event_id", primary_key=True),
    Column("attempt", Integer, primary_key=True, autoincrement=False),
    Column("outcome", Text, primary_key=True),
    Column("process", Text),
    _at("began_at", nullable=True),
    _at("ended_at"),
    Column("error", Text, nullable=False),
    CheckConstraint("outcome IN ('failed', 'dead', 'abandoned')", name="outcome"),
)

# One row. Rotated by hand after a restore that keeps the system identifier and the timeline.
epoch = Table(
    "ledger_epoch",
    metadata,
    Column("singleton", Boolean, primary_key=True, server_default=text("true")),
    Column("id", Uuid, nullable=False),
    _at("rotated_at"),
    CheckConstraint("singleton", name="singleton"),
)

# What was changed by hand. `changed` is null while it goes on, and stays so when it was interrupted.
operator_actions = Table(
    "operator_actions",
    metadata,
    Column("action_id", BigInteger, Identity(always=True), primary_key=True),
    _at("at"),
    Column("operator", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("selection", Text, nullable=False),
    Column("changed", BigInteger),
)
