"""The live display of a run, on stderr: redrawn on a terminal, one line an event elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from trainchain.cli import audits
from trainchain.cli.output import Output, fancy
from trainchain.core import money

if TYPE_CHECKING:
    from trainchain.core.models import ResolvedRecipe

BAR = 24


class Progress:
    """Told of the job and of its workers' events; shows round, shards, loss, tokens/s and what was earned."""

    def __init__(self, out: Output, recipe: ResolvedRecipe) -> None:
        self._out = out
        self._recipe = recipe
        self._lock = threading.Lock()
        self._view: dict[str, Any] = {}
        self._workers: dict[str, dict[str, Any]] = {}
        self._earned: dict[str, int] = {}
        self._said: set[tuple[Any, ...]] = set()
        self._began = time.monotonic()
        self._live: Any = None
        wide = (sys.stderr.encoding or "").lower().startswith("utf")
        self._full, self._empty = ("\u2501", "\u2500") if wide else ("#", ".")

    def __enter__(self) -> Progress:
        if fancy():
            from rich.console import Console
            from rich.live import Live

            console = Console(stderr=True, highlight=False)
            self._live = Live(console=console, refresh_per_second=4, get_renderable=self._draw, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def worker(self, name: str, event: dict[str, Any]) -> None:
        """Take note of what a worker says."""
        with self._lock:
            self._workers[name] = event
            if event["event"] == "accepted":
                self._earned[name] = self._earned.get(name, 0) + int(event["amount"])
        if event["event"] == "accepted":
            self._once(
                ("accepted", event["round"], event["shard"]),
                f"round {event['round']}  shard {event['shard']} accepted  {name}  "
                f"+{money.show(int(event['amount']))} TRAIN",
            )
        elif event["event"] in ("failed", "away"):
            self._say(f"{name}  {event['message']}")

    def job(self, view: dict[str, Any]) -> None:
        """Take note of where the job stands."""
        with self._lock:
            self._view = view
        for row in view["evaluations"]:
            if row["loss"] is not None:
                label = "base" if row["round"] == 0 else f"round {row['round']}"
                self._once(("loss", row["round"]), f"{label}  held-out loss {row['loss']:.4f}")
        before: list[dict[str, Any]] = []
        for row in view["rounds_done"]:
            if row["state"] == "merged":
                late = sum(shard.get("merged_in") == row["round"] for shard in before)
                done = sum(shard.get("merged_in") == row["round"] for shard in row["shards"])
                text = f"round {row['round']}  {done}/{self._recipe.shards} shards merged"
                self._once(("merged", row["round"]), text + (f", and {late} of the round before" if late else ""))
            before = row["shards"]
            for shard in row["shards"]:
                audit = shard.get("audit")
                if audit and audit["code"]:
                    text = f"round {row['round']}  shard {shard['shard']} audited  {audits.standing(audit)}"
                    self._once(("audited", row["round"], shard["shard"]), text)

    def _once(self, key: tuple[Any, ...], text: str) -> None:
        with self._lock:
            fresh = key not in self._said
            self._said.add(key)
        if fresh and (self._live is None or key[0] not in ("accepted", "audited")):
            self._say(text)

    def _say(self, text: str) -> None:
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            self._out.note(text)

    def _draw(self) -> Any:
        from rich.text import Text

        with self._lock:
            view, workers, earned = self._view, dict(self._workers), dict(self._earned)
        recipe = self._recipe
        rounds = view.get("rounds_done", [])
        in_time = [sum(shard.get("merged_in") == row["round"] for shard in row["shards"]) for row in rounds]
        done, whole = sum(min(count, recipe.shards) for count in in_time), recipe.rounds * recipe.shards
        losses = [row["loss"] for row in view.get("evaluations", []) if row["loss"] is not None]
        filled = BAR * done // whole
        speed = sum(event.get("tokens_per_second", 0.0) for event in workers.values() if event["event"] == "step")
        loss = f"{losses[0]:.3f} > {losses[-1]:.3f}" if len(losses) > 1 else (f"{losses[0]:.3f}" if losses else "-")
        text = Text(no_wrap=True, overflow="ellipsis")
        text.append(recipe.name, "bold").append(f"  round {view.get('round', 0)}/{recipe.rounds}  ")
        text.append(self._full * filled, "green").append(self._empty * (BAR - filled), "dim")
        text.append(f"  {done}/{whole} shards  {time.monotonic() - self._began:.0f} s\n")
        text.append("held-out loss ").append(loss, "bold").append(f"   {speed:,.0f} tokens/s   earned ")
        text.append(f"{money.show(sum(earned.values()))} TRAIN", "green")
        if view and (counts := audits.counted(view))["drawn"]:
            text.append(f"   audited {counts['drawn'] - audits.pending(view)}/{counts['drawn']}")
            text.append(f"  {counts['failed']} rejected" if counts["failed"] else "", "red")
        for name, event in sorted(workers.items()):
            text.append(f"\n  {name}  {_doing(event)}")
        return text


def _doing(event: dict[str, Any]) -> str:
    match event["event"]:
        case "step":
            return (
                f"round {event['round']}  shard {event['shard']}  step {event['step']}/{event['steps']}  "
                f"{event['tokens_per_second']:,.0f} tokens/s"
            )
        case "leased":
            return f"round {event['round']}  shard {event['shard']}  starting"
        case "accepted":
            return f"round {event['round']}  shard {event['shard']}  accepted +{money.show(int(event['amount']))} TRAIN"
        case "drawn" | "answered" | "auditing":
            return "waiting for a verdict"
        case "waiting":
            return "waiting for a shard"
        case _:
            return str(event["event"])
