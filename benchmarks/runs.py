"""The runs of a study: trained and scored, some at once; what is done lies in the state folder."""

import json
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jobs import Job, Size, document_rows, prepare
from launch import log, run_side


class Runs:
    """`settings` are what must be alike in every run that the folder holds."""

    def __init__(
        self, state: Path, settings: Mapping[str, Any], *, side_by_side: int, threads: int, limit_seconds: float
    ) -> None:
        self.state = state
        self._side_by_side, self._threads, self._limit = side_by_side, threads, limit_seconds
        state.mkdir(parents=True, exist_ok=True)
        kept, wanted = state / "settings.json", json.dumps(settings, default=str, sort_keys=True)
        if kept.exists() and kept.read_text(encoding="utf-8") != wanted:
            raise SystemExit(f"{state} holds runs of other settings; name another folder.")
        kept.write_text(wanted, encoding="utf-8")

    def prepared(self, name: str, model: Path, data: Path, size: Size, training: Mapping[str, Any]) -> Job:
        job = Job(self.state / name)
        if not job.complete:
            shutil.rmtree(job.folder, ignore_errors=True)
            prepare(job.folder, model, data, size, training)
        return job

    def held_out(self, name: str, model: Path, *parts: tuple[Path, int, int], length: int) -> None:
        """Rows to score on: of each part's file, from the first on, so many."""
        rows = [row for file, first, count in parts for row in document_rows(model, file, length, first, count)]
        self._rows(name).write_text(json.dumps(rows), encoding="utf-8")

    def train_all(self, specs: Mapping[str, Mapping[str, Any]]) -> None:
        """Each, by its name, that has not run yet."""
        with ThreadPoolExecutor(self._side_by_side) as pool:
            list(pool.map(self._train, specs, specs.values()))

    def _train(self, name: str, spec: Mapping[str, Any]) -> None:
        if self._path(name).is_file():
            log.info("%s: done before", name)
            return
        self._run(name, spec)
        log.info("%s: trained", name)

    def result(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._path(name).read_text(encoding="utf-8"))
        return found

    def score_all(self, rows: str, job: Job, adapters: Mapping[str, str]) -> dict[str, float]:
        """Held-out losses of adapters, each by its name."""
        spec = {"side": "score", "job": str(job.folder), "rows": str(self._rows(rows)), "adapters": dict(adapters)}
        losses: dict[str, float] = self._run(f"score-{rows}", spec)["losses"]
        for name in adapters:
            log.info("%s: held-out loss %.4f on the %s rows", name, losses[name], rows)
        return losses

    def _run(self, name: str, spec: Mapping[str, Any]) -> dict[str, Any]:
        return run_side({"threads": self._threads} | dict(spec), self.state, name, self._limit)

    def _rows(self, name: str) -> Path:
        return self.state / f"{name}-rows.json"

    def _path(self, name: str) -> Path:
        return self.state / f"{name}.json"
