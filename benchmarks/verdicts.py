"""What honest pairs and cheats of `replays.py` come to: rejections, worst and nearest distances.

A pair is judged by its tolerance in the table; and by twice the worst pair of its precision in which the machine had no
part, or by what is NOTHING where that is less.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import report
from launch import log

from trainchain.core.replays import Distances
from trainchain.core.tolerances import Tolerance, beyond

MARGIN = 2.0
NOTHING = 1e-4
"""A distance that is no more than last bits in any precision, and a hundredth of the nearest cheat's."""
CLAIMED = "as claimed"
SAME = frozenset({CLAIMED, "again", "checkpointing"})
"""What must have the same bits."""


@dataclass(frozen=True)
class Scene:
    """What a recipe pins of the arithmetic, and how many steps a segment has."""

    precision: str
    attention: str = "sdpa"
    adapter_path: str = "fused"
    segment_steps: int = 5
    quantization: str = "none"

    @property
    def name(self) -> str:
        steps = "" if self.segment_steps == 5 else f", segments of {self.segment_steps}"
        kind = self.precision if self.quantization == "none" else f"{self.quantization}-{self.precision}"
        return f"{kind} {self.attention} {self.adapter_path}{steps}"


@dataclass(frozen=True)
class Pair:
    """Two honest ends of one segment, or a cheat's and an honest one."""

    scene: Scene
    segment: str
    cold: bool
    claimed: str
    replayed: str
    found: Distances
    limit: Tolerance

    @property
    def refused(self) -> bool:
        return bool(beyond(self.found, self.limit))

    @property
    def machines(self) -> set[str]:
        return {self.claimed, self.replayed}


def judged(pairs: Sequence[Pair]) -> list[report.Figure]:
    """False rejections by the table, and by a tolerance that has not seen the machine."""
    refused = [pair for pair in pairs if pair.refused]
    for pair in refused[:20]:
        log.info("refused by the table: %s", pair)
    found = [report.must("false rejections by the table", len(refused), "pairs", "0", not refused)]
    missed = checks = 0
    for _, alike in _grouped(pairs, lambda pair: (pair.scene.precision, pair.cold)):
        for variant in sorted({name for pair in alike for name in pair.machines}):
            rest = [pair.found for pair in alike if variant not in pair.machines]
            limit = Tolerance(*(max(value, NOTHING) for value in vars(_worst(rest, MARGIN)).values()))
            mine = [pair for pair in alike if variant in pair.machines]
            checks += len(mine)
            for pair in mine:
                if exceeded := beyond(pair.found, limit):
                    missed += 1
                    log.info("beyond the others: %s %s", exceeded, pair)
    text = f"of {checks} checks; of no limit below {NOTHING:g}"
    return [
        *found,
        report.must("false rejections, machine left out, margin 2", missed, "checks", "0", not missed, peer=text),
    ]


def equal(pairs: Sequence[Pair]) -> list[report.Figure]:
    """Restarted processes, and checkpointing, must have the same bits."""
    same = [pair for pair in pairs if pair.machines <= SAME]
    apart = [pair for pair in same if any(vars(pair.found).values())]
    text = f"of {len(same)} pairs"
    return [report.must("pairs of one class and split that differ", len(apart), "pairs", "0", not apart, peer=text)]


def caught(cheats: Sequence[Pair]) -> list[report.Figure]:
    found = []
    for (scene, name), alike in _grouped(cheats, lambda pair: (pair.scene, pair.claimed)):
        refused = sum(pair.refused for pair in alike)
        share = round(100 * refused / len(alike), 1)
        found.append(report.Figure(f"{scene.name}: {name}", share, "% rejected", peer=f"of {len(alike)} replays"))
    return found


def worst(pairs: Sequence[Pair]) -> dict[str, dict[str, Any]]:
    """Of each scene, cold and warm: the largest distances of any honest pair, and the tolerance beside them."""
    found: dict[str, dict[str, Any]] = {}
    for (scene, is_cold), alike in _grouped(pairs, lambda pair: (pair.scene, pair.cold)):
        furthest = max(alike, key=lambda pair: pair.found.gradients)
        found.setdefault(scene.name, {})["cold" if is_cold else "warm"] = {
            **{name: float(f"{value:.2g}") for name, value in vars(_worst([p.found for p in alike], 1.0)).items()},
            "pairs": len(alike),
            "furthest": f"{furthest.claimed} - {furthest.replayed}",
            "tolerance": vars(alike[0].limit),
        }
    return found


def by_machine(pairs: Sequence[Pair]) -> dict[str, dict[str, Any]]:
    claims = [pair for pair in pairs if pair.claimed == CLAIMED]
    found: dict[str, dict[str, Any]] = {}
    for (scene, variant), alike in _grouped(claims, lambda pair: (pair.scene, pair.replayed)):
        rows = {}
        for is_cold, each in _grouped(alike, lambda pair: pair.cold):
            limits = vars(_worst([pair.found for pair in each], 1.0))
            rows["cold" if is_cold else "warm"] = [float(f"{value:.2g}") for value in limits.values()]
        found.setdefault(scene.name, {})[variant] = rows
    return found


def nearest(cheats: Sequence[Pair]) -> dict[str, dict[str, Any]]:
    """Of each cheat, cold and warm: the smallest distances from any honest replay."""
    found: dict[str, dict[str, Any]] = {}
    for (scene, name), alike in _grouped(cheats, lambda pair: (pair.scene, pair.claimed)):
        rows = {}
        for is_cold, each in _grouped(alike, lambda pair: pair.cold):
            least = {key: min(getattr(pair.found, key) for pair in each) for key in vars(alike[0].limit)}
            rows["cold" if is_cold else "warm"] = [float(f"{value:.2g}") for value in least.values()]
        found.setdefault(scene.name, {})[name] = rows
    return found


def _grouped(pairs: Iterable[Pair], key: Any) -> list[tuple[Any, list[Pair]]]:
    found: dict[Any, list[Pair]] = defaultdict(list)
    for pair in pairs:
        found[key(pair)].append(pair)
    return list(found.items())


def _worst(found: Sequence[Distances], margin: float) -> Tolerance:
    def limit(name: str) -> float:
        return margin * max((getattr(each, name) for each in found), default=0.0)

    return Tolerance(limit("gradients"), limit("squares"), limit("delta"), limit("length"))
