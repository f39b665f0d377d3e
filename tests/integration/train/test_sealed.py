"""A sealed job trains the bits of the same job published openly, and takes nothing that its blocks do not hold."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pyarrow.parquet import write_table

from tests.fixtures_model import chat_rows, make_tokenizer, resolve_recipe, write_jsonl
from tests.fixtures_sealed import SealedJob, seal_job
from tests.integration.train.conftest import Job
from tests.integration.train.test_segments import LEASE, Stopped, states_in, stop_at, the_same
from trainchain.core.digests import sha256_file
from trainchain.core.errors import TrainChainError
from trainchain.core.models import DataFormat, DataSet, FileRef, ResolvedRecipe
from trainchain.core.segments import start_state, state_digests
from trainchain.core.sharding import DataOrder
from trainchain.core.train.blocks import Blocks, read_block
from trainchain.core.train.data import (
    Plan,
    count_all,
    data_order,
    load_documents,
    plan_shard,
    shard_batches,
    stand_in,
)
from trainchain.core.train.trainer import Engine

MakeJob = Callable[..., Job]
TOKENIZER = make_tokenizer()
VOCABULARY = len(TOKENIZER)
WORDS = st.text('ab c\N{LATIN SMALL LETTER E WITH ACUTE}\N{FISH}\n"\\', max_size=30)
TURNS = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant"]), "content": WORDS},
    optional={"name": WORDS, "weight": st.just(1), "tool_calls": st.none()},
)
SHAREGPT = st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt"]), "value": WORDS})
ROWS: dict[DataFormat, st.SearchStrategy[dict[str, Any]]] = {
    "text": st.fixed_dictionaries({"text": WORDS}),
    "prompt_completion": st.fixed_dictionaries({"prompt": WORDS, "completion": WORDS}, optional={"customer": WORDS}),
    "chat_template": st.fixed_dictionaries({"messages": st.lists(TURNS, min_size=1, max_size=3), "customer": WORDS})
    | st.fixed_dictionaries({"messages": st.none(), "conversations": st.lists(SHAREGPT, min_size=1, max_size=3)}),
}
FILES = st.lists(
    st.sampled_from(sorted(ROWS)).flatmap(
        lambda form: st.tuples(st.just(form), st.lists(ROWS[form], min_size=1, max_size=8))
    ),
    min_size=1,
    max_size=3,
)


@pytest.fixture(scope="session")
def any_recipe(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> ResolvedRecipe:
    data = write_jsonl(tmp_path_factory.mktemp("any") / "train.jsonl", chat_rows(24))
    return resolve_recipe(tiny, data)[0]


def words(plan: Plan) -> list[list[tuple[list[int], list[bool]]]]:
    """What is trained on, by step."""
    documents = plan.documents
    return [[(documents.ids[row].tolist(), documents.masks[row].tolist()) for row in step] for step in plan.steps]


@settings(deadline=None, max_examples=60)
@given(
    files=FILES,
    seed=st.integers(0, 5),
    batch_size=st.integers(1, 4),
    steps=st.integers(1, 3),
    sequence_len=st.integers(16, 48),
)
def test_the_rows_of_the_blocks_are_those_of_the_open_order(
    any_recipe: ResolvedRecipe,
    tmp_path_factory: pytest.TempPathFactory,
    files: list[tuple[DataFormat, list[dict[str, Any]]]],
    seed: int,
    batch_size: int,
    steps: int,
    sequence_len: int,
) -> None:
    folder = tmp_path_factory.mktemp("law")
    table = folder / "table.parquet"
    texts = ["fish live in the sea", "x", ""] * batch_size
    write_table(pa.table({"text": texts, "customer": list(range(len(texts)))}), table)
    sources: list[tuple[Path, DataFormat]] = [
        (table, "text"),
        *((write_jsonl(folder / f"{at}.jsonl", rows), form) for at, (form, rows) in enumerate(files)),
    ]
    documents = load_documents(sources, TOKENIZER, sequence_len)
    training = any_recipe.training.model_copy(
        update={"seed": seed, "batch_size": batch_size, "sequence_len": sequence_len}
    )
    sizes = {"rounds": 2, "shards": 2, "steps": steps}
    assume(DataOrder(documents.lengths(), sequence_len=sequence_len, seed=seed).size(0) >= batch_size)
    counts = count_all(documents, sequence_len=sequence_len, batch_size=batch_size, seed=seed, spares=1, **sizes)
    merge = any_recipe.merge.model_copy(update={"spares": 0.5})
    datasets = [
        DataSet(
            source=None,
            file=FileRef(name=path.name, sha256=sha256_file(path), size=path.stat().st_size),
            format=form,
            rows=1,
        )
        for path, form in sources
    ]
    changes = {**sizes, "training": training, "datasets": datasets, "counts": counts, "merge": merge}
    recipe = any_recipe.model_copy(update=changes)
    order = data_order(recipe, documents)

    blocks = list(Blocks(recipe, documents, sources, None))
    assert [(round, shard) for round, shard, _ in blocks] == [(round, shard) for round in (1, 2) for shard in (0, 1, 2)]
    for round, shard, text in blocks:
        wanted = plan_shard(documents, documents.lengths(), shard_batches(recipe, order, round, shard))
        found = read_block(text, recipe, round, shard, TOKENIZER, VOCABULARY)
        assert words(found) == words(wanted)
        assert found.counts == wanted.counts
        # a row is itself again wherever it is in the open order: how a step is split may go by it
        pairs = {
            pair
            for mine, theirs in zip(found.steps, wanted.steps, strict=True)
            for pair in zip(mine, theirs, strict=True)
        }
        assert len(pairs) == len({mine for mine, _ in pairs}) == len({theirs for _, theirs in pairs})
        assert b"customer" not in text


def sealed_engine(job: Job, private: SealedJob, **options: Any) -> Engine:
    """Opened as a worker opens it, who has no data."""
    return Engine(private.recipe, job.model, {}, threads=1, **options)


def seal(job: Job, folder: Path) -> SealedJob:
    return seal_job(job.recipe, job.model, job.data, folder / "sealed")


def test_a_sealed_job_is_the_open_job_to_the_bit(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(steps=5, rounds=3)
    private = seal(job, tmp_path)
    engine, open_engine = sealed_engine(job, private), job.engine()
    assert engine.numeric_class == open_engine.numeric_class
    start = job.start

    for round, shard, block in private.plain:
        found = engine.train(start, round, shard, LEASE, block=block)
        wanted = open_engine.train(start, round, shard, LEASE)
        assert the_same(found, wanted)
        assert found.counts == wanted.counts
        start = wanted.end
    held_out = private.plain.held_out()
    assert engine.evaluate(start, held_out=held_out) == open_engine.evaluate(start)
    assert engine.evaluate(None) == open_engine.evaluate(None)


@pytest.mark.parametrize("rows", [3, 7])
def test_rows_that_come_again_within_a_step_are_split_alike(tiny: Path, tmp_path: Path, rows: int) -> None:
    pairs = [{"prompt": "Who?", "completion": "Nobody."}, {"prompt": "", "completion": "x"}]
    data = [
        write_jsonl(tmp_path / "chats.jsonl", chat_rows(rows)),
        write_jsonl(tmp_path / "texts.jsonl", [{"text": f"{at} fish in the sea"} for at in (1, 2, 1)]),
        write_jsonl(tmp_path / "pairs.jsonl", pairs),
    ]
    recipe, initial = resolve_recipe(tiny, data, batch_size=2, steps=6, micro_batch_size=1, shards=1)
    job = Job(recipe, tiny, {sha256_file(path): path for path in data}, initial)
    private = seal(job, tmp_path)

    (_, _, first), (_, _, second) = private.plain
    assert first.count(b'"again"') > rows
    found = sealed_engine(job, private).train(job.start, 2, 0, LEASE, block=second)
    assert the_same(found, job.engine().train(job.start, 2, 0, LEASE))


def test_a_sealed_shard_goes_on_from_its_last_segment_and_replays(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainchain.core.train.trainer.REPORT_SECONDS", 0.0)
    job = make_job(steps=7)
    private, states = seal(job, tmp_path), tmp_path / "states"
    block = private.plain.block(2, 1)
    with pytest.raises(Stopped):
        sealed_engine(job, private).train(job.start, 2, 1, LEASE, stop_at(6), states=states, block=block)
    engine = sealed_engine(job, private)
    result = engine.train(job.start, 2, 1, LEASE, states=states, block=block)

    assert result.resumed == 2
    assert the_same(result, job.engine().train(job.start, 2, 1, LEASE))
    ends = [start_state(job.start), *states_in(states, engine)]
    replayed = sealed_engine(job, private).replay(ends[1], 2, 1, 1, block=block)
    assert state_digests(replayed) == result.segments[1].digests == state_digests(ends[2])


def test_without_its_rows_a_sealed_job_is_not_trained(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job()
    engine = sealed_engine(job, seal(job, tmp_path))

    for work in (
        lambda: engine.train(job.start, 1, 0, LEASE),
        lambda: engine.replay(start_state(job.start), 1, 0, 0),
        lambda: engine.evaluate(None),
    ):
        with pytest.raises(TrainChainError, match="is sealed, and") as caught:
            work()
        assert caught.value.code == "source.missing"


SECRET = "marmalade"


def changed(block: bytes, line: int, value: object) -> bytes:
    """The block with another value in its 1-based line."""
    lines = block.splitlines(keepends=True)
    lines[line - 1] = (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n"
    return b"".join(lines)


def header(block: bytes, **values: object) -> bytes:
    return changed(block, 1, json.loads(block.splitlines()[0]) | values)


def moved(block: bytes) -> bytes:
    """As many sequences and rows, with another one's row in the first."""
    sizes = json.loads(block.splitlines()[0])["sequences"]
    donor = next(at for at, size in enumerate(sizes) if at and size > 1)
    sizes[0], sizes[donor] = sizes[0] + 1, sizes[donor] - 1
    return header(block, sequences=sizes)


def row(form: str = "chat_template", **fields: object) -> dict[str, object]:
    return {"format": form, "row": fields}


BAD: list[tuple[Callable[[bytes], bytes], int, str]] = [
    (lambda block: block[:-1], 40, "is torn"),
    (lambda block: b"", 1, "is torn"),
    (lambda block: b"\n" + block, 1, "is not JSON"),
    (lambda block: changed(block, 1, {}), 1, "is not the header of that block"),
    (lambda block: header(block, more=1), 1, "is not the header of that block"),
    (lambda block: header(block, round=2), 1, "is not the header of that block"),
    (lambda block: header(block, kind="held_out"), 1, "is not the header of that block"),
    (lambda block: header(block, sequences=7), 1, "does not divide"),
    (lambda block: header(block, sequences=[1, 2]), 1, "does not divide"),
    (lambda block: header(block, sequences=[0] * 16), 1, "does not divide"),
    (lambda block: header(block, sequences=[True] * 16), 1, "does not divide"),
    (lambda block: header(block, sequences=[1] * 16), 1, "does not divide"),
    (moved, 2, "begins a sequence of more than 96 tokens"),
    (lambda block: changed(block, 3, b"\xff" + SECRET.encode()), 3, "is not JSON in UTF-8"),
    (lambda block: changed(block, 3, f'"{SECRET}'.encode()), 3, "is not JSON in UTF-8"),
    (lambda block: changed(block, 3, b"[" * 100_000), 3, "is not JSON in UTF-8"),
    (lambda block: changed(block, 3, [SECRET]), 3, "is not a JSON object"),
    (lambda block: changed(block, 3, {SECRET: 1}), 3, "is not a row with its format"),
    (lambda block: changed(block, 3, {"again": 5}), 3, "is not a row with its format"),
    (lambda block: changed(block, 3, {"again": -1}), 3, "is not a row with its format"),
    (lambda block: changed(block, 3, {"again": False}), 3, "is not a row with its format"),
    (lambda block: changed(block, 3, row(SECRET)), 3, "has a format that the recipe does not name"),
    (lambda block: changed(block, 3, row("text", text=SECRET)), 3, "has a format that the recipe does not name"),
    (lambda block: changed(block, 3, row(messages=SECRET)), 3, "cannot be tokenized as chat_template"),
    (lambda block: changed(block, 3, row(messages=[{"role": SECRET}])), 3, "cannot be tokenized as chat_template"),
    (lambda block: changed(block, 3, row(messages=[{"role": "user", "content": SECRET}])), 3, "has no token to train"),
]  # fmt: skip


@pytest.mark.parametrize(("harm", "line", "says"), BAD)
def test_a_block_that_is_not_sound_is_refused_by_its_line_and_shows_nothing(
    make_job: MakeJob, tmp_path: Path, harm: Callable[[bytes], bytes], line: int, says: str
) -> None:
    job = make_job()
    (_, _, block) = next(iter(Blocks(*opened(job), None)))
    if "torn" in says and harm(block):
        line = len(block.splitlines())

    with pytest.raises(TrainChainError, match=says) as caught:
        read_block(harm(block), job.recipe, 1, 0, TOKENIZER, VOCABULARY)

    assert caught.value.code == "data.format"
    assert caught.value.message.startswith(f"The block of shard 0 of round 1 is not sound: line {line} ")
    assert SECRET not in caught.value.message + caught.value.hint + repr(caught.value.facts)


def opened(job: Job) -> tuple[ResolvedRecipe, Any, list[tuple[Path, DataFormat]]]:
    sources: list[tuple[Path, DataFormat]] = [
        (job.data[d.file.sha256], d.format) for d in job.recipe.datasets if d.file
    ]
    return job.recipe, load_documents(sources, TOKENIZER, job.recipe.training.sequence_len), sources


def test_other_rows_than_were_pinned_are_refused(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job()
    plain = Blocks(*opened(job), None)
    block = plain.block(1, 0)
    chat = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a"}]}

    with pytest.raises(TrainChainError, match="In shard 0 of round 1 this machine counts") as caught:
        read_block(changed(block, 2, {"format": "chat_template", "row": chat}), job.recipe, 1, 0, TOKENIZER, VOCABULARY)
    assert caught.value.code == "data.count_mismatch"
    for other in ((1, 1), (2, 0)):
        with pytest.raises(TrainChainError, match="is not the header of that block"):
            read_block(plain.block(*other), job.recipe, 1, 0, TOKENIZER, VOCABULARY)
    with pytest.raises(TrainChainError, match="has a token that the base model does not know"):
        read_block(block, job.recipe, 1, 0, TOKENIZER, VOCABULARY - 20)


def test_held_out_rows_are_checked_too(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job()
    private = seal(job, tmp_path)
    engine, text = sealed_engine(job, private), private.plain.held_out()
    more = json.dumps({"format": "chat_template", "row": chat_rows(1)[0]}).encode() + b"\n"

    for harmed, says in (
        (private.plain.block(1, 0), "line 1 is not the header"),
        (text + more, "followed by 6 rows, and the recipe pins 5"),
        (changed(text, 2, {"again": 0}), "line 2 is not a row"),
        (changed(text, 4, row("text", text=SECRET)), "line 4 has a format that the recipe does not name"),
    ):
        with pytest.raises(TrainChainError, match=says) as caught:
            engine.evaluate(None, held_out=harmed)
        assert caught.value.code == "data.format"
        assert SECRET not in caught.value.message
    with pytest.raises(TrainChainError) as caught:
        engine.evaluate(None, held_out=changed(text, 6, more.rstrip()))
    assert caught.value.code == "data.count_mismatch"
    assert np.isfinite(engine.evaluate(None, held_out=text))


def test_data_that_changed_since_it_was_resolved_is_not_sealed(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job()
    recipe, documents, sources = opened(job)
    held_out = job.recipe.held_out
    assert held_out is not None
    assert held_out.dataset.file is not None
    path = job.data[held_out.dataset.file.sha256]
    blocks = Blocks(recipe, documents, sources, path)
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(TrainChainError, match="changed while it was read") as caught:
        blocks.held_out()
    assert caught.value.code == "source.changed"
    for change in (b"\n", json.dumps(chat_rows(1)[0]).encode()):
        sources[0][0].write_bytes(sources[0][0].read_bytes() + change)
        with pytest.raises(TrainChainError, match="changed while it was read"):
            Blocks(recipe, documents, sources, None)


def test_many_rows_lie_in_a_file_without_a_name(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job()
    wanted = list(Blocks(*opened(job), None))
    monkeypatch.setattr("trainchain.core.train.blocks.IN_MEMORY", 10)

    assert list(Blocks(*opened(job), None)) == wanted


@pytest.mark.parametrize("size", [None, 320, 2])
def test_a_model_can_be_tried_before_there_are_rows(size: int | None) -> None:
    documents = stand_in(TOKENIZER, size)

    assert len(documents) == 2
    assert all(len(ids) > 1 for ids in documents.ids)
    assert size is None or max(map(max, documents.ids)) < max(size, 4)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full, a disk without room, is Linux's")
def test_rows_that_do_not_fit_are_said(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job()
    given = opened(job)
    with Path("/dev/full").open("wb", buffering=0) as full:
        monkeypatch.setattr("tempfile.SpooledTemporaryFile", lambda **_: full)
        with pytest.raises(TrainChainError, match=r"do not fit into .*: No space left on device") as caught:
            Blocks(*given, None)
    assert caught.value.code == "disk.full"
