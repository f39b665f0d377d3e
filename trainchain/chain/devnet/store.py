"""One SQLite file a chain: py-evm's key-value store, and our own index of transactions and logs."""

import json
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eth.db.backends.base import BaseDB

_SCHEMA = """
CREATE TABLE IF NOT EXISTS kv (key BLOB PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS tx (hash TEXT PRIMARY KEY, block INTEGER NOT NULL,
    tx TEXT NOT NULL, receipt TEXT NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS tx_block ON tx (block);
CREATE TABLE IF NOT EXISTS log (block INTEGER NOT NULL, place INTEGER NOT NULL, address TEXT NOT NULL,
    topic0 TEXT, topic1 TEXT, topic2 TEXT, topic3 TEXT, log TEXT NOT NULL,
    PRIMARY KEY (block, place)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS log_topics ON log (address, topic0, topic1);
"""

_WAL_TRIES = 200


class Store(BaseDB):  # type: ignore[misc]  # py-evm has no types
    """The file. One connection behind one lock: py-evm is no more made for threads than a cursor is."""

    def __init__(self, path: Path) -> None:
        self.lock = threading.RLock()
        self._db = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
        # NORMAL under WAL survives every kill; only the power going off can lose the last blocks.
        self._use_wal()
        self._db.execute("PRAGMA synchronous=NORMAL")
        with self.writing():
            for statement in _SCHEMA.split(";"):
                self._db.execute(statement)

    def _use_wal(self) -> None:
        # Turning WAL on wants the file alone for a moment, and unlike other statements does not wait for it.
        for attempt in range(_WAL_TRIES):
            try:
                self._db.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError as problem:
                if "locked" not in str(problem) or attempt == _WAL_TRIES - 1:
                    raise
            time.sleep(0.05)

    def close(self) -> None:
        with self.lock:
            self._db.close()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Everything inside lands, or none of it; other processes wait."""
        with self.lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    @contextmanager
    def reading(self) -> Iterator[None]:
        """One moment of the chain, whatever other processes write meanwhile."""
        with self.lock:
            self._db.execute("BEGIN")
            try:
                yield
            finally:
                # Nothing was written: py-evm keeps a simulated call's state in memory.
                self._db.execute("ROLLBACK")

    def __getitem__(self, key: bytes) -> bytes:
        row = self._db.execute("SELECT value FROM kv WHERE key = ?", (key,)).fetchone()
        if row is None:
            raise KeyError(key)
        value: bytes = row[0]
        return value

    def __setitem__(self, key: bytes, value: bytes) -> None:
        self._db.execute("INSERT OR REPLACE INTO kv VALUES (?, ?)", (key, value))

    def __delitem__(self, key: bytes) -> None:
        if self._db.execute("DELETE FROM kv WHERE key = ?", (key,)).rowcount == 0:
            raise KeyError(key)

    def _exists(self, key: bytes) -> bool:
        return self._db.execute("SELECT 1 FROM kv WHERE key = ?", (key,)).fetchone() is not None

    def note(self, key: str) -> str | None:
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def set_note(self, key: str, value: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def add_transaction(self, tx: dict[str, Any], receipt: dict[str, Any]) -> None:
        number = int(tx["blockNumber"], 16)
        row = (tx["hash"], number, json.dumps(tx), json.dumps(receipt))
        self._db.execute("INSERT INTO tx VALUES (?, ?, ?, ?)", row)
        for log in receipt["logs"]:
            topics = [*log["topics"], None, None, None, None][:4]
            entry = (number, int(log["logIndex"], 16), log["address"], *topics, json.dumps(log))
            self._db.execute("INSERT INTO log VALUES (?, ?, ?, ?, ?, ?, ?, ?)", entry)

    def transaction(self, tx_hash: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
        row = self._db.execute("SELECT tx, receipt FROM tx WHERE hash = ?", (tx_hash,)).fetchone()
        return None if row is None else (json.loads(row[0]), json.loads(row[1]))

    def transactions_of(self, block: int) -> list[dict[str, Any]]:
        rows = self._db.execute("SELECT tx FROM tx WHERE block = ?", (block,))
        return [json.loads(row[0]) for row in rows]

    def logs(
        self,
        first: int,
        last: int,
        addresses: Sequence[str],
        topics: Sequence[Sequence[str]],
        limit: int,
    ) -> list[dict[str, Any]]:
        """Logs of the blocks first to last. An empty list, for a topic or the address, means any."""
        where, values = ["block BETWEEN ? AND ?"], [first, last, *addresses]
        if addresses:
            where.append(f"address IN ({','.join('?' * len(addresses))})")
        for place, choices in enumerate(topics[:4]):
            if choices:
                where.append(f"topic{place} IN ({','.join('?' * len(choices))})")
                values += choices
        query = f"SELECT log FROM log WHERE {' AND '.join(where)} ORDER BY block, place LIMIT ?"
        return [json.loads(row[0]) for row in self._db.execute(query, (*values, limit))]
