"""The hub's state in SQL: connections, transactions, and the one function that moves a row to its next state."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Table, create_engine, event, insert, select, update
from sqlalchemy.engine import RowMapping

from trainchain.core.errors import TrainChainError
from trainchain.core.hub import schema
from trainchain.core.states import check_move

Row = RowMapping


class Store:
    """SQLite in WAL mode; a write transaction takes the write lock at its start, so it never fails half-way as busy."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.engine = create_engine(
            f"sqlite:///{path}", connect_args={"timeout": 30, "check_same_thread": False}, pool_size=20
        )
        event.listen(self.engine, "connect", _prepare)
        event.listen(self.engine, "begin", _begin)
        path.touch(mode=0o600)
        with self.write() as db:
            schema.meta.create(db, checkfirst=True)
            version = db.execute(select(schema.meta.c.value).where(schema.meta.c.key == "schema")).scalar()
            if version not in (None, str(schema.VERSION)):
                raise TrainChainError(
                    "hub.other_version",
                    f"{path} has tables of version {version}; this is version {schema.VERSION}.",
                    hint="Let the version that made it finish its jobs, and start this one with another --home.",
                )
            schema.metadata.create_all(db)
            if version is None:
                db.execute(insert(schema.meta).values(key="schema", value=str(schema.VERSION)))

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """One transaction that holds the write lock; commits unless the block raises."""
        with self.engine.connect().execution_options(trainchain_write=True) as db, db.begin():
            yield db

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """One consistent snapshot."""
        with self.engine.connect() as db, db.begin():
            yield db

    def close(self) -> None:
        self.engine.dispose()


def _prepare(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # the driver must not open transactions of its own
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(db: Connection) -> None:
    immediate = db.get_execution_options().get("trainchain_write", False)
    db.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")


def move(
    db: Connection,
    table: Table,
    row: Row,
    after: StrEnum,
    *,
    now: float,
    data: Mapping[str, Any] | None = None,
    **fields: Any,
) -> bool:
    """Move `row` from the state it was read in to `after`, unless someone moved it first (then False).

    One guarded UPDATE on (key, state, version), and an event: the same lock on SQLite and PostgreSQL.
    """
    before = type(after)(row["state"])
    check_move(before, after)
    key = [column == row[column.name] for column in table.primary_key]
    moved = db.execute(
        update(table)
        .where(*key, table.c.state == before, table.c.version == row["version"])
        .values(state=str(after), version=row["version"] + 1, **fields)
    )
    if moved.rowcount == 0:
        return False
    names = [column.name for column in table.primary_key]
    subject = "/".join([table.name.removesuffix("s"), *(str(row[n]) for n in names if n != "job")])
    job = row["id"] if table is schema.jobs else row["job"]
    record(db, job, subject, f"{before}->{after}", now, data)
    return True


def record(
    db: Connection, job: str, subject: str, kind: str, now: float, data: Mapping[str, Any] | None = None
) -> None:
    """Write an event of a job."""
    db.execute(insert(schema.events).values(at=now, job=job, subject=subject, kind=kind, data=dict(data or {})))


def one(db: Connection, table: Table, **key: Any) -> Row | None:
    """The row of `table` with these column values, or None."""
    query = select(table).where(*(table.c[name] == value for name, value in key.items()))
    return db.execute(query).mappings().first()
