"""How far honest replays are apart, over the machines that this one can play, and how far cheats are from them.

A claim is made here: shards trained by the engine, with one thread and every instruction that the processor has. Then
its segments are replayed in processes of their own: with other threads, with libraries that may not use AVX-512, AMX
or AVX2, with other splits into micro-batches, with checkpointing, or in the same way once more. Every pair of ends of
one segment is an honest claim and its replay, and is judged by the table of `core/tolerances.py`; and by twice the
worst of the pairs in which the machine that is judged had no part.

Prints one JSON document on stdout. Exits 0 whatever it finds, 1 where a process did not run to its end.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import report
from launch import OWN_PROCESS, begin, log
from replayer import CHEATS, Segment, load
from verdicts import CLAIMED, Pair, Scene, by_machine, caught, equal, judged, nearest, worst

from trainchain.core.adapter import adapter_bytes, read_adapter, tensor_specs
from trainchain.core.encodings import decode, encode
from trainchain.core.models import ResolvedRecipe
from trainchain.core.replays import Distances, distances
from trainchain.core.segments import Moments, State, read_state, start_state, state_bytes, state_digests
from trainchain.core.tolerances import Tolerance, cold, tolerance

PACKAGES = ("trainchain", "torch", "transformers", "numpy")
LEASE = "0x" + "00" * 32
OLD = 100
"""The job's last round, whose moments are old: a segment adds little to the second."""
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
SSE4 = {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41"}
MACHINES: dict[str, tuple[int, dict[str, str]]] = {
    "again": (1, {}),
    "two threads": (2, {}),
    "all AVX2": (1, AVX2),
    "all AVX2, two threads": (2, AVX2),
    "oneDNN without AMX": (1, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}),
    "all SSE4": (1, SSE4),
    "MKL AVX2": (1, {"MKL_ENABLE_INSTRUCTIONS": "AVX2"}),
    "ATen AVX2": (1, {"ATEN_CPU_CAPABILITY": "avx2"}),
    "oneDNN without bf16": (1, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}),
    "oneDNN AVX2": (1, {"ONEDNN_MAX_CPU_ISA": "AVX2"}),
    "MKL SSE4": (1, {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}),
    "MKL compatible": (1, {"MKL_CBWR": "COMPATIBLE"}),
}
"""Threads, and what the libraries may use."""
FEW = ("again", "two threads", "all AVX2", "oneDNN without AMX")
"""The machines that every scene is replayed on; the first scenes are on all."""
SPLITS: dict[str, dict[str, Any]] = {
    "a row at a time": {"micro_tokens": 1},
    "checkpointing": {"checkpointing": True},
    "a row at a time, checkpointing": {"micro_tokens": 1, "checkpointing": True},
}


MAIN = (Scene("fp32"), Scene("bf16"))
SCENES = (
    *MAIN,
    *(Scene(precision, "eager") for precision in ("fp32", "bf16")),
    *(Scene(precision, adapter_path="peft") for precision in ("fp32", "bf16")),
    *(Scene(precision, segment_steps=1) for precision in ("fp32", "bf16")),
    Scene("fp16"),
)


class Stage:
    """The job, its scenes' recipes and segments, and the folder of all their ends."""

    def __init__(self, model: Path, data: Path, folder: Path, scenes: Sequence[Scene], quick: bool) -> None:
        self.model, self.folder, self.quick, self.scenes = model, folder, quick, scenes
        self.recipe, self.initial, self.files = _job(model, data, folder, quick)
        self.shapes = {name: tensor.shape for name, tensor in self.initial.items()}
        self.segments: dict[Scene, dict[str, list[Segment]]] = {}

    def recipe_of(self, scene: Scene, moments: str) -> ResolvedRecipe:
        way = {"training": self.recipe.training.model_copy(update=asdict(scene))}
        return self.recipe.model_copy(update=way | {"merge": self.recipe.merge.model_copy(update={"moments": moments})})

    def engine(self, scene: Scene, moments: str = "merged") -> Any:
        from trainchain.core.train.trainer import Engine

        return Engine(self.recipe_of(scene, moments), self.model, self.files, threads=1)

    def claim(self, scene: Scene) -> None:
        """Train shards, and keep the states of some of their segments: cold ones, warm ones, ones with old moments."""
        merged, fresh = self.engine(scene), self.engine(scene, "fresh")
        kept = (0, 1, 3) if scene.segment_steps == 1 else (0, 1)
        one = self._shard(merged, scene, "merged", 1, 0, self.initial, None, kept)
        delta = {name: one.end[name] - self.initial[name] for name in one.end}
        sent = decode(encode(delta, "int4", one.moments), "int4", tensor_specs(self.initial), moments=True).moments
        assert sent is not None
        self._shard(merged, scene, "merged", OLD, 0, one.end, self._aged(sent), kept[:1])
        self._shard(fresh, scene, "fresh", 2, 0, one.end, None, kept[:1])
        if scene in MAIN:
            self._shard(merged, scene, "merged", 2, 0, one.end, sent, kept)
            self._shard(merged, scene, "merged", OLD, 1, one.end, self._aged(sent), kept)
            self._shard(merged, scene, "merged", 1, 1, self.initial, None, kept)
            self._shard(merged, scene, "merged", 2, 1, one.end, sent, kept)
            self._shard(fresh, scene, "fresh", 2, 1, one.end, None, kept)
        for engine, moments in ((merged, "merged"), (fresh, "fresh")):
            path = self.folder / f"{scene.name} {moments}.json"
            path.write_bytes(engine.recipe.canonical())
            engine.close()

    def _aged(self, moments: Moments) -> Moments:
        """Moments as if they had seen all rounds before the last, and not one: as large as their bias allows."""
        training, steps = self.recipe.training, self.recipe.steps

        def grown(part: Mapping[str, Any], beta: float) -> dict[str, Any]:
            by = (1 - beta ** ((OLD - 1) * steps)) / (1 - beta**steps)
            return {name: (by * tensor).astype("float32") for name, tensor in part.items()}

        return Moments(grown(moments.m, training.adam_beta1), grown(moments.v, training.adam_beta2))

    def _shard(
        self, engine: Any, scene: Scene, moments: str, round_: int, shard: int, start: Any, m: Moments | None, kept: Any
    ) -> Any:
        folder = self.folder / f"{scene.name} {moments} {round_} {shard}"
        found = engine.train(start, round_, shard, LEASE, moments=m, states=folder)
        (folder / "state-00000.safetensors").write_bytes(state_bytes(start_state(start, m)))
        for number in kept:
            name = f"{moments} {round_}.{shard}.{number}"
            path = folder / f"state-{number:05}.safetensors"
            segment = Segment(name, str(path), number * scene.segment_steps, round_, shard, number)
            self.segments.setdefault(scene, defaultdict(list))[moments].append(segment)
            end = self.end(CLAIMED, scene, moments, segment)
            end.parent.mkdir(parents=True, exist_ok=True)
            end.write_bytes((folder / f"state-{number + 1:05}.safetensors").read_bytes())
        return found

    def end(self, variant: str, scene: Scene, moments: str, segment: Segment) -> Path:
        return self.folder / "ends" / variant / f"{scene.name} {moments}" / f"{segment.name}.safetensors"

    def each(self, scene: Scene) -> Iterator[tuple[str, Segment, State]]:
        for moments, segments in self.segments[scene].items():
            for segment in segments:
                yield moments, segment, read_state(Path(segment.start).read_bytes(), segment.t, self.shapes)

    def ends(self, scene: Scene, moments: str, segment: Segment) -> dict[str, State]:
        found = {}
        for variant in (CLAIMED, *MACHINES, *SPLITS):
            path = self.end(variant, scene, moments, segment)
            if path.exists():
                found[variant] = read_state(path.read_bytes(), segment.t + scene.segment_steps, self.shapes)
        return found

    def replay(self, machine: str) -> list[dict[str, Any]]:
        """Replay all that this machine is to replay, in a process that is it."""
        threads, settings = MACHINES[machine]
        jobs = []
        for scene, ways in self.segments.items():
            variants: dict[str, dict[str, Any]] = {machine: {}} if scene in MAIN or machine in FEW else {}
            if machine == "again" and scene in MAIN:
                variants |= SPLITS
            for (variant, options), (moments, segments) in itertools.product(variants.items(), ways.items()):
                name = f"{scene.name} {moments}"
                job = {"recipe": str(self.folder / f"{name}.json"), "scene": name, "variant": variant}
                jobs.append({**job, **options, "segments": [asdict(segment) for segment in segments]})
        if not jobs:
            return []
        result = self.folder / f"{machine}.result.json"
        spec: dict[str, Any] = {
            "model": str(self.model),
            "data": {digest: str(path) for digest, path in self.files.items()},
        }
        spec |= {"threads": threads, "jobs": jobs, "folder": str(self.folder / "ends"), "result": str(result)}
        path = self.folder / f"{machine}.spec.json"
        path.write_text(json.dumps(spec), encoding="utf-8")
        environment = os.environ | OWN_PROCESS | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        command = [sys.executable, str(Path(__file__).with_name("replayer.py")), str(path)]
        subprocess.run(command, env=environment | settings, stdin=subprocess.DEVNULL, check=True, timeout=400)
        found: list[dict[str, Any]] = json.loads(result.read_text(encoding="utf-8"))
        return found

    def cold(self, moments: str, segment: Segment) -> bool:
        return cold(start=segment.t, fresh=moments == "fresh" or segment.round == 1)

    def limit(self, scene: Scene, is_cold: bool) -> Tolerance:
        return tolerance(self.recipe_of(scene, "merged").training, cold=is_cold)

    def between(self, start: State, claimed: State, replayed: State) -> Distances:
        training = self.recipe.training
        return distances(start, claimed, replayed, beta1=training.adam_beta1, beta2=training.adam_beta2)

    def pairs(self, scene: Scene) -> list[Pair]:
        """Every two honest ends of every segment of a scene."""
        found = []
        for moments, segment, start in self.each(scene):
            ends, is_cold = self.ends(scene, moments, segment), self.cold(moments, segment)
            for one, other in itertools.combinations(ends, 2):
                apart = self.between(start, ends[one], ends[other])
                found.append(Pair(scene, segment.name, is_cold, one, other, apart, self.limit(scene, is_cold)))
        return found

    def cheats(self, scene: Scene) -> list[Pair]:
        """What cheats claim, against every honest end."""
        found = []
        for moments, segments in self.segments[scene].items():
            engine = self.engine(scene, moments)
            other = self.engine(replace(scene, precision="bf16"), moments) if scene.precision == "fp32" else None
            for segment in segments[: 2 if moments == "merged" else 1]:
                start, ends = load(engine, segment), self.ends(scene, moments, segment)
                is_cold = self.cold(moments, segment)
                for name, made in _claims(engine, other, segment):
                    for variant, end in ends.items():
                        apart = self.between(start, made, end)
                        found.append(
                            Pair(scene, segment.name, is_cold, name, variant, apart, self.limit(scene, is_cold))
                        )
            engine.close()
            if other is not None:
                other.close()
        return found


def _claims(engine: Any, other: Any, segment: Segment) -> Iterator[tuple[str, State]]:
    for name, cheat in CHEATS.items():
        yield name, cheat(engine, segment)
    for by in (0.9, 0.5):
        yield f"learning rate x {by}", _slower(engine, segment, by)
    if other is not None:
        yield "bf16 in place of fp32", other.replay(load(other, segment), segment.round, segment.shard, segment.number)


def _slower(engine: Any, segment: Segment, by: float) -> State:
    honest = engine.recipe
    rate = honest.training.model_copy(update={"learning_rate": by * honest.training.learning_rate})
    engine.recipe = honest.model_copy(update={"training": rate})
    try:
        end: State = engine.replay(load(engine, segment), segment.round, segment.shard, segment.number)
    finally:
        engine.recipe = honest
    return end


def main() -> int:
    begin("replays")
    parser = argparse.ArgumentParser(description="How far honest replays and cheats are from what was claimed.")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="the base model's folder")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="jsonl of training rows")
    parser.add_argument("--quick", action="store_true", help="two scenes, three machines, short rows")
    given = parser.parse_args()
    figures: list[report.Figure] = []
    more: dict[str, Any] = {}
    code = 0
    with tempfile.TemporaryDirectory(prefix="trainchain-bench-", ignore_cleanup_errors=True) as temporary:
        scenes = MAIN if given.quick else SCENES
        try:
            study(
                Stage(given.model.resolve(), given.data.resolve(), Path(temporary), scenes, given.quick), figures, more
            )
        except (subprocess.SubprocessError, OSError) as error:
            log.error("%s", error)
            figures.append(report.failure("replays", str(error)))
            code = 1
    settings = {"model": given.model.name, "data": given.data.name, "quick": given.quick}
    report.write(report.document("replays", PACKAGES, settings, figures, **more))
    return code


def study(stage: Stage, figures: list[report.Figure], more: dict[str, Any]) -> None:
    for scene in stage.scenes:
        stage.claim(scene)
        log.info("%s: claimed", scene.name)
    told: list[dict[str, Any]] = []
    machines = [name for name in MACHINES if name in FEW[:3] or not stage.quick]
    for machine in machines:
        found = stage.replay(machine)
        told += found
        log.info("%s: %.0f s of replays", machine, sum(each["seconds"] for each in found))
    classes = defaultdict(set)
    for each in told:
        classes[each["variant"]].add(each["class"] or f"absent: {each['absent']}")
    pairs = [pair for scene in stage.scenes for pair in stage.pairs(scene)]
    replays = sum(len(stage.ends(scene, *each[:2])) - 1 for scene in stage.scenes for each in stage.each(scene))
    figures.append(report.must("honest replays", replays, "replays", ">= 500", replays >= 500))
    figures.append(report.Figure("honest pairs judged", len(pairs), "pairs"))
    figures += judged(pairs)
    figures += equal(pairs)
    cheats = [pair for scene in MAIN if scene in stage.scenes for pair in stage.cheats(scene)]
    figures += caught(cheats)
    figures += costs(stage)
    more["classes"] = {variant: sorted(names) for variant, names in classes.items()}
    more["worst honest distances"] = worst(pairs)
    more["worst honest distances from the claim, by machine"] = by_machine(pairs)
    more["nearest cheats"] = nearest(cheats)


def costs(stage: Stage) -> list[report.Figure]:
    """What committing costs a worker, and comparing a hub, at a shard of 512-token rows in batches of eight."""
    size = {"sequence_len": 64 if stage.quick else 512, "batch_size": 8, "micro_batch_size": 2, "segment_steps": 5}
    recipe = stage.recipe_of(MAIN[0], "fresh")
    recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update=size)})
    from trainchain.core.train.trainer import Engine

    engine = Engine(recipe, stage.model, stage.files, threads=1)
    start = start_state(stage.initial)
    began = time.perf_counter()
    end = engine.replay(start, 1, 0, 0)
    training = time.perf_counter() - began

    def commit() -> None:
        state_digests(end)
        _keep(stage.folder / "kept", state_bytes(end))

    committing = _timed(commit)
    copying = _timed(lambda: engine._adapted.snapshot(5))
    comparing = _timed(lambda: stage.between(start, end, end))
    engine.close()
    share = 100 * committing / training
    return [
        report.Figure("state", len(state_bytes(end)), "bytes"),
        report.Figure("a segment of 5 steps of 8 x 512 tokens", round(training, 3), "s"),
        report.at_most("hashing and keeping a state, as a share of its segment", share, "%", 1.0, digits=3),
        report.Figure("copying a state out of the optimizer", round(1000 * copying, 3), "ms"),
        report.Figure("comparing two states of it, numpy", round(1000 * comparing, 3), "ms"),
    ]


def _keep(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _timed(act: Any) -> float:
    def once() -> float:
        began = time.perf_counter()
        act()
        return time.perf_counter() - began

    return statistics.median(once() for _ in range(9))


def _job(model: Path, data: Path, folder: Path, quick: bool) -> tuple[ResolvedRecipe, Any, Mapping[str, Path]]:
    """Resolved as an owner's machine does it."""
    from trainchain.cli.bring import Bringer
    from trainchain.cli.plan import resolve
    from trainchain.core.worker.cache import Cache

    with data.open(encoding="utf-8") as lines:
        (folder / "train.jsonl").write_text("".join(itertools.islice(lines, 400)), encoding="utf-8")
    recipe = {
        "name": "replays",
        "base_model": str(model),
        "datasets": [{"path": str(folder / "train.jsonl")}],
        "lora_r": 4,
        "lora_alpha": 8,
        "sequence_len": 64 if quick else 96,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2 if quick else 1,
        "learning_rate": 5e-3,
        "seed": 1,
        "rounds": OLD,
        "shards": 2,
        "steps": 10,
        "segment_steps": 5,
        "bf16": False,
        "pay": {"per_million_tokens": "0", "budget": "1"},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    found = resolve(folder / "recipe.yaml", Bringer(lambda: Cache(folder / "cache"), note=lambda _: None))
    initial = read_adapter(found.initial)
    assert adapter_bytes(initial) == found.initial
    return found.resolved, initial, dict(found.files)


if __name__ == "__main__":
    raise SystemExit(main())
