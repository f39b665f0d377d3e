"""The hub's tables. The rules that a transaction must never break stand here again as constraints."""

from typing import Any

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Dialect,
    Float,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.types import TypeDecorator

VERSION = 7
metadata = MetaData()


class Units(TypeDecorator[int]):
    """Token units: integers beyond 64 bits, kept as decimal text."""

    impl = String(40)
    cache_ok = True

    def process_bind_param(self, value: int | None, dialect: Dialect) -> str | None:
        return None if value is None else str(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> int | None:
        return None if value is None else int(value)


ID = String(66)

meta = Table("meta", metadata, Column("key", String(40), primary_key=True), Column("value", Text, nullable=False))

jobs = Table(
    "jobs",
    metadata,
    Column("id", ID, primary_key=True),
    Column("name", String(64), nullable=False),
    Column("owner", ID, nullable=False),
    Column("salt", ID, nullable=False),
    Column("spec_hash", ID, nullable=False),
    Column("recipe", Text, nullable=False),
    Column("anyone", Boolean, nullable=False),
    Column("state", String(16), nullable=False),
    Column("version", Integer, nullable=False, default=0),
    Column("created", Float, nullable=False),
    Column("deadline", Float),
    Column("grace", Float),
    Column("funded", Units, nullable=False, default=0),
    Column("round", Integer, nullable=False, default=0),
    Column("settled_round", Integer, nullable=False, default=0),
)

# Whom a job admits that does not admit anyone; addresses in lower case.
admissions = Table(
    "admissions",
    metadata,
    Column("job", ID, primary_key=True),
    Column("wallet", ID, primary_key=True),
    ForeignKeyConstraint(["job"], ["jobs.id"]),
)

# The keys of a job's sealed files, each wrapped by the owner for this hub; none is ever kept in clear.
keys = Table(
    "keys",
    metadata,
    Column("job", ID, primary_key=True),
    Column("digest", String(64), primary_key=True),
    Column("wrapped", String(400), nullable=False),
    ForeignKeyConstraint(["job"], ["jobs.id"]),
)

rounds = Table(
    "rounds",
    metadata,
    Column("job", ID, primary_key=True),
    Column("round", Integer, primary_key=True),
    Column("state", String(16), nullable=False),
    Column("version", Integer, nullable=False, default=0),
    Column("start", String(64), nullable=False),
    Column("adapter", String(64)),
    Column("outer_step", String(64)),
    # What draws the round's audits: told to nobody before no draw can use it any more (core/draws.py).
    Column("secret", ID, nullable=False),
    Column("secret_hash", ID, nullable=False),
    Column("secret_signature", String(132), nullable=False),
    Column("opened", Float, nullable=False),
    Column("deadline", Float, nullable=False),
    Column("closed", Float),
    Column("merged", Float),
    Column("merge_seconds", Float),
    Column("merge_error", Float),
    ForeignKeyConstraint(["job"], ["jobs.id"]),
)

shards = Table(
    "shards",
    metadata,
    Column("job", ID, primary_key=True),
    Column("round", Integer, primary_key=True),
    Column("shard", Integer, primary_key=True),
    Column("state", String(16), nullable=False),
    Column("version", Integer, nullable=False, default=0),
    Column("spare", Boolean, nullable=False),
    Column("lease", ID),
    ForeignKeyConstraint(["job", "round"], ["rounds.job", "rounds.round"]),
)

leases = Table(
    "leases",
    metadata,
    Column("id", ID, primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("job", ID, nullable=False),
    Column("round", Integer, nullable=False),
    Column("shard", Integer),
    Column("worker", ID, nullable=False),
    Column("state", String(16), nullable=False),
    Column("version", Integer, nullable=False, default=0),
    Column("taken", Float, nullable=False),
    Column("expires", Float, nullable=False),
    Column("progress", JSON),
    Index("leases_by_expiry", "state", "expires"),
    Index("leases_by_job", "job", "worker"),
)
Index(
    "one_held_lease_a_shard",
    leases.c.job,
    leases.c.round,
    leases.c.shard,
    unique=True,
    sqlite_where=text("state = 'held' AND kind = 'train'"),
    postgresql_where=text("state = 'held' AND kind = 'train'"),
)

contributions = Table(
    "contributions",
    metadata,
    Column("lease", ID, primary_key=True),
    Column("job", ID, nullable=False),
    Column("round", Integer, nullable=False),
    Column("shard", Integer, nullable=False),
    Column("worker", ID, nullable=False),
    # Its place among the worker's in this job, from 1 on: pay vests in this order (core/rewards.py).
    Column("place", Integer, nullable=False),
    Column("delta", String(64), nullable=False),
    Column("signed", JSON, nullable=False),
    Column("reward", Units, nullable=False),
    Column("receipt", JSON, nullable=False),
    Column("accepted", Float, nullable=False),
    # The round whose merge takes it in: its own or, where it came late, the next; none where its own was the last.
    Column("merged_in", Integer),
    Column("merge", JSON),
    # The first settlement that may know that it stands: 0 where no audit was drawn, none while a verdict is due.
    Column("resolved", Integer, default=0),
    # The first settlement that may know that it is forfeited.
    Column("forfeited", Integer),
    # Another one that its worker signed for the same lease: proof of a second story.
    Column("second", JSON),
    # The number of the settlement that first pays it.
    Column("settled_in", Integer),
    UniqueConstraint("job", "round", "shard", name="one_contribution_a_shard"),
    UniqueConstraint("job", "worker", "place", name="one_contribution_a_place"),
    UniqueConstraint("job", "delta", name="no_copy_in_a_job"),
)

evaluations = Table(
    "evaluations",
    metadata,
    Column("job", ID, primary_key=True),
    Column("round", Integer, primary_key=True),
    # Of a round that is judged: 0 is its merge as it is, the others are without some contributions (hub/judging.py).
    Column("candidate", Integer, primary_key=True, default=0),
    Column("state", String(16), nullable=False),
    Column("version", Integer, nullable=False, default=0),
    Column("adapter", String(64), nullable=False),
    # When it was asked for, and then when it was done.
    Column("at", Float, nullable=False),
    Column("lease", ID),
    Column("loss", Float),
    Column("samples", JSON),
    Column("merge", JSON),
)

# One a contribution that a draw fell on; `lease` is the contribution's.
audits = Table(
    "audits",
    metadata,
    Column("lease", ID, primary_key=True),
    Column("job", ID, nullable=False),
    Column("round", Integer, nullable=False),
    Column("shard", Integer, nullable=False),
    Column("worker", ID, nullable=False),
    Column("segment", Integer, nullable=False),
    Column("at_risk", Integer, nullable=False),
    Column("state", String(16), nullable=False),
    Column("version", Integer, nullable=False, default=0),
    Column("drawn", Float, nullable=False),
    # Indices of the states that the worker still owes, and until when.
    Column("wants", JSON, nullable=False),
    Column("answer_by", Float, nullable=False),
    # What it opened (messages.Answer), and when all it owed was there.
    Column("answer", JSON),
    Column("answered", Float),
    # The verdict's reason code, its evidence document's digest, and when.
    Column("code", String(40)),
    Column("evidence", String(64)),
    Column("decided", Float),
    ForeignKeyConstraint(["lease"], ["contributions.lease"]),
    UniqueConstraint("job", "round", "shard", name="one_audit_a_shard"),
    Index("audits_by_state", "state", "job"),
)

# One an auditor's lease on an audit; it is signed once `end_leaf` is there.
replays = Table(
    "replays",
    metadata,
    Column("lease", ID, primary_key=True),
    Column("audit", ID, nullable=False),
    Column("job", ID, nullable=False),
    Column("auditor", ID, nullable=False),
    # Why it may: verdicts.Role.
    Column("role", String(12), nullable=False),
    # Whether the answer was known when it was handed out: it pays the same, and decides nothing about the audit.
    Column("ringer", Boolean, nullable=False),
    Column("signed", JSON),
    Column("end_leaf", ID),
    # Distances from the claim, where it is not equal (core/replays.py).
    Column("distances", JSON),
    Column("fee", Units, nullable=False),
    # As a contribution's: its place among its auditor's in this job, and the settlements that count with it.
    Column("place", Integer),
    Column("counted", Integer),
    Column("forfeited", Integer),
    Column("settled_in", Integer),
    Column("done", Float),
    ForeignKeyConstraint(["audit"], ["audits.lease"]),
    UniqueConstraint("audit", "auditor", name="one_replay_an_auditor"),
    Index("replays_by_job", "job", "auditor"),
)

# Training states that were handed in, by the lease (a contribution's or a replay's) and the state's index.
states = Table(
    "states",
    metadata,
    Column("lease", ID, primary_key=True),
    Column("index", Integer, primary_key=True),
    Column("job", ID, nullable=False),
    Column("digest", String(64), nullable=False),
    ForeignKeyConstraint(["lease"], ["leases.id"]),
)

settlements = Table(
    "settlements",
    metadata,
    Column("job", ID, primary_key=True),
    Column("round", Integer, primary_key=True),
    Column("root", ID, nullable=False),
    Column("total", Units, nullable=False),
    Column("leaves", String(64), nullable=False),
    Column("ended", Boolean, nullable=False),
    Column("limit", Units, nullable=False),
    # None until the chain has it: what is settled is written down before it is sent, so that a hub that dies in
    # between sends the same again.
    Column("tx", ID),
    Column("at", Float, nullable=False),
)

# The newest voucher of each worker: everything that has vested for it in the job.
vouchers = Table(
    "vouchers",
    metadata,
    Column("job", ID, primary_key=True),
    Column("account", ID, primary_key=True),
    Column("cumulative", Units, nullable=False),
    # The last places that it counts: all of its account's before them that are not forfeited have vested.
    Column("shards", Integer, nullable=False, default=0),
    Column("fees", Integer, nullable=False, default=0),
    Column("signature", String(132), nullable=False),
    Column("at", Float, nullable=False),
    ForeignKeyConstraint(["job"], ["jobs.id"]),
)

objects = Table(
    "objects",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("job", ID, primary_key=True),
    Column("size", Integer, nullable=False),
    Column("public", Boolean, nullable=False),
    Column("present", Boolean, nullable=False),
    Column("lease", ID),
    Index("objects_by_job", "job"),
)

nonces = Table(
    "nonces",
    metadata,
    Column("nonce", String(64), primary_key=True),
    Column("expires", Float, nullable=False),
)

sessions = Table(
    "sessions",
    metadata,
    Column("token_hash", String(64), primary_key=True),
    Column("address", ID, nullable=False),
    Column("expires", Float, nullable=False),
)

grants = Table(
    "grants",
    metadata,
    Column("address", ID, primary_key=True),
    Column("at", Float, nullable=False),
)

events = Table(
    "events",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("at", Float, nullable=False),
    Column("job", ID, nullable=False),
    Column("subject", String(200), nullable=False),
    Column("kind", String(64), nullable=False),
    Column("data", JSON, nullable=False),
    Index("events_by_job", "job", "seq"),
)
