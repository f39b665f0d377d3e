from pathlib import Path

import pytest

from tests.fixtures_model import resolve_recipe
from tests.integration.train.conftest import Job
from trainchain.core.digests import sha256_file

SHARED = Path(__file__).parents[4] / "shared"
BASE = SHARED / "models" / "trainchain-tiny-base"
GSM8K = SHARED / "data" / "gsm8k"


def head(source: Path, rows: int, path: Path) -> Path:
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)[:rows]
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.mark.real
@pytest.mark.skipif(not BASE.is_dir() or not GSM8K.is_dir(), reason="the shared model and data are not here")
def test_a_shard_of_school_maths_lowers_the_held_out_loss_of_a_real_base(tmp_path: Path) -> None:
    train, test = head(GSM8K / "train.jsonl", 1000, tmp_path / "train.jsonl"), GSM8K / "test.jsonl"
    sizes = {"sequence_len": 256, "batch_size": 8, "r": 8, "held_out_rows": 30, "rounds": 1, "shards": 1, "steps": 20}
    recipe, initial = resolve_recipe(BASE, train, test, learning_rate=4e-3, **sizes)
    job = Job(recipe, BASE, {sha256_file(path): path for path in (train, test)}, initial)
    engine = job.engine()

    result = engine.train(job.start, 1, 0, "0x" + "00" * 32)

    first, last, _ = result.losses
    assert last < 0.6 * first
    assert engine.evaluate(result.end) < 0.6 * engine.evaluate(None)
