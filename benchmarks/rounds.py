"""A whole job on one machine: what its workers train, what its hub merges, one after another in one process.

Every contribution goes through the encoding and the cheap checks of the hub, every round through its merge and its
outer step. Without a way to merge, one worker trains alone and goes on exactly where it was.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs import Job

LEASE = "0x" + "00" * 32


def train(spec: Mapping[str, Any]) -> dict[str, Any]:
    """`jobs` is one job whose shards the workers take, or one for each worker, who takes all of its shards.

    `merge` has the fields of the recipe's `merge`; `dies` and `late` are the shares of every round's contributions that
    are lost, and that are merged a round late with half of their weight. Which ones is drawn from `seed`.
    """
    import numpy as np
    from safetensors.numpy import save_file

    from trainchain.core.adapter import read_adapter, tensor_specs
    from trainchain.core.checks import read_delta
    from trainchain.core.digests import sha256
    from trainchain.core.encodings import decode, encode
    from trainchain.core.merge.moments import Adam
    from trainchain.core.merge.updates import Update, judge, merge, outer_step

    engines = [_engine(Job(Path(job)), spec) for job in spec["jobs"]]
    places = [(engine, shard) for engine in engines for shard in range(engine.recipe.shards)]
    recipe, alone = engines[0].recipe, spec["merge"] is None
    way, training, random = recipe.merge, recipe.training, np.random.default_rng(spec["seed"])
    start, before, moments = read_adapter(Job(Path(spec["jobs"][0])).start), None, None
    shapes, up, down, tokens = tensor_specs(start), [], [], 0
    waiting: list[Update] = []
    for round_ in range(1, recipe.rounds + 1):
        own: list[Update] = []
        late: set[str] = set()
        lost, slow = (round(spec[share] * len(places)) for share in ("dies", "late"))
        for at, place in enumerate(random.permutation(len(places))):
            if at < lost:
                continue
            engine, shard = places[place]
            result = engine.train(start, round_, shard, LEASE, moments=moments)
            tokens += result.counts.tokens
            if alone:
                start, moments = dict(result.end), result.moments
                continue
            data = encode(result.delta, way.encoding, result.moments if way.hands_on else None)
            up.append(len(data))
            own.append(Update(sha256(data), result.counts.tokens, *read_delta(data, recipe, shapes, round_)))
            if at >= len(places) - slow:
                late.add(own[-1].digest)
        if alone:
            continue
        updates = [*waiting, *(update for update in own if update.digest not in late)]
        shares = judge(way, start, own) if late else {}
        waiting = [
            update._replace(weight=update.weight / 2, share=shares[update.digest])
            for update in own
            if update.digest in late
        ]
        adam = Adam(training.adam_beta1, training.adam_beta2, round_ * recipe.steps, training.max_grad_norm)
        step = outer_step(way, start, merge(way, start, updates, before=before, adam=adam))
        moments = decode(step.data, way.encoding, shapes, moments=way.hands_on).moments
        before, start = start, step.adapter
        down.append(len(step.data))
    path = Path(spec["result"]).with_suffix(".safetensors")
    save_file(start, path)
    sizes = {"bytes_up": max(up, default=0), "bytes_down": max(down, default=0)}
    return {"adapter": str(path), "tokens": tokens, "numbers": sum(x.size for x in start.values()), **sizes}


def _engine(job: Job, spec: Mapping[str, Any]) -> Any:
    from trainchain.core.models import Merge, ResolvedRecipe, Training, parse
    from trainchain.core.train.trainer import Engine

    recipe = parse(ResolvedRecipe, job.recipe.read_bytes(), code="job.invalid", what="The recipe")
    training = Training(**(recipe.training.model_dump() | spec["training"]))
    alone = {"moments": "merged"}  # one machine keeps its moments
    way = Merge(**(recipe.merge.model_dump() | (alone if spec["merge"] is None else spec["merge"])))
    told = job.load()
    files = {digest: Path(path) for digest, path in told["files"].items()}
    recipe = recipe.model_copy(update={"training": training, "merge": way})
    return Engine(recipe, Path(told["model"]), files, threads=spec["threads"])
