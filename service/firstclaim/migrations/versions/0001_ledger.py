"""The ledger, its payloads and its epoch."""

from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.execute(
        """
        CREATE TABLE stripe_events (
            event_id    text COLLATE "C" CONSTRAINT stripe_events_pkey PRIMARY KEY,
            type        text        NOT NULL,
            account     text,
            livemode    boolean     NOT NULL,
            api_version text,
            object_id   text,
            created_at  timestamptz NOT NULL,
            status      text        NOT NULL,
            attempt     integer     NOT NULL,
            failures    integer     NOT NULL DEFAULT 0,
            abandoned   integer     NOT NULL DEFAULT 0,
            action      text,
            last_error  text,
            received_at timestamptz NOT NULL,
            due_at      timestamptz NOT NULL,
            give_up_at  timestamptz NOT NULL,
            settled_at  timestamptz,
            CONSTRAINT stripe_events_status_check
                CHECK (status IN ('pending', 'processing', 'completed', 'ignored', 'failed', 'dead')),
            CONSTRAINT stripe_events_counts_check
                CHECK (attempt >= 0 AND failures >= 0 AND abandoned >= 0),
            CONSTRAINT stripe_events_settled_check
                CHECK ((status IN ('completed', 'ignored', 'dead')) = (settled_at IS NOT NULL))
        )
        """
    )
    op.execute(
        """
        CREATE INDEX stripe_events_due ON stripe_events (due_at)
        WHERE status IN ('pending', 'processing', 'failed')
        """
    )
    op.execute(
        """
        CREATE TABLE stripe_event_payloads (
            event_id text COLLATE "C" CONSTRAINT stripe_event_payloads_pkey PRIMARY KEY,
            body     bytea NOT NULL
        )
        """
    )
    op.execute(
        """
        CREATE TABLE ledger_epoch (
            singleton  boolean     NOT NULL DEFAULT true
                       CONSTRAINT ledger_epoch_pkey PRIMARY KEY
                       CONSTRAINT ledger_epoch_singleton_check CHECK (singleton),
            id         uuid        NOT NULL,
            rotated_at timestamptz NOT NULL
        )
        """
    )
    op.execute("INSERT INTO ledger_epoch (id, rotated_at) VALUES (gen_random_uuid(), clock_timestamp())")
