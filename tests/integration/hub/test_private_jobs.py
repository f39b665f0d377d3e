"""Private jobs at the hub: whom it admits, what it hides, and what becomes of contributions there."""

from typing import Any

import pytest

from tests.fixtures_hub import INITIAL, STEPS, Job, Person, Town, new_wallet, numbers, seal_files, sealed_recipe
from trainchain.chain import eip712
from trainchain.core.adapter import adapter_bytes
from trainchain.core.digests import sha256
from trainchain.core.errors import CODES
from trainchain.core.hub import leases, schema, views
from trainchain.core.hub.leases import CHOICES, MAX_HELD, MAX_SKIPPED

NEVER = "0x" + "12" * 32
IDLE = new_wallet()


def code(answer: Any) -> str:
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    found = str(answer.json()["code"])
    assert answer.status_code == CODES[found].status
    return found


def anybody(town: Town, path: str) -> Any:
    return town.http.get(town.url + path)


def test_an_owner_trains_a_job_that_is_his_alone(town: Town, anna: Person) -> None:
    job = town.publish_sealed(workers="owner")

    assert anna.lease(job) is None
    assert job.owner.work(job)["round"] == 1


def test_a_list_admits_who_stands_in_it_in_any_case_of_letters(town: Town, anna: Person, ben: Person) -> None:
    job = town.publish_sealed(workers=[anna.address.lower(), "0x" + anna.address[2:].upper()])

    assert anna.work(job)["round"] == 1
    assert ben.lease(job) is None
    assert job.owner.lease(job) is None, "an owner who is not in the list pays, and does not train"


def test_a_private_job_may_admit_anyone(town: Town, anna: Person) -> None:
    job = town.publish_sealed(workers="anyone")

    assert anna.work(job)["round"] == 1


def test_a_private_job_at_the_front_starves_nobody(tmp_path: Any) -> None:
    town = Town(tmp_path)
    anna = town.person()
    private = town.publish_sealed(workers="owner", rounds=1, shards=CHOICES + 3)
    town.clock.forward(1)
    open_to_all = town.publish(shards=1)

    assert anna.must_lease()["job"] == open_to_all.id
    assert anna.lease() is None
    assert town.owner.must_lease()["job"] == private.id
    town.close()


def test_who_is_not_admitted_looks_without_the_write_lock(town: Town, anna: Person) -> None:
    """Nobody who waits may stand in the way of those who work."""
    job = town.publish_sealed(workers="owner")

    with town.hub.store.write():
        assert leases.take(town.hub, anna.address, job.id) is None


def test_a_worker_names_the_jobs_it_cannot_do(town: Town, anna: Person) -> None:
    first, second = town.publish(), town.publish_sealed(workers=[anna.address])
    others = [row["id"] for row in town.rows(schema.jobs) if row["id"] not in (first.id, second.id)]

    def lease(*skip: str) -> Any:
        return anna.post("/v1/leases", {"skip": [*skip, *others[-MAX_SKIPPED + 2 :]]})

    assert lease(first.id).json()["job"] == second.id
    assert anna.post("/v1/leases", {"job": first.id, "skip": [first.id]}).status_code == 204
    assert code(anna.post("/v1/leases", {"skip": [NEVER] * (MAX_SKIPPED + 1)})) == "http.bad_request"
    assert code(anna.post("/v1/leases", {"skip": ["tiny"]})) == "http.bad_request"


def test_an_evaluator_may_skip_jobs_too(town: Town) -> None:
    job, evaluator = town.publish_sealed(held_out=True, workers="owner"), town.person(town.evaluator_keys)

    while found := evaluator.post("/v1/leases", {"skip": [job.id]}).content:
        assert job.id.encode() not in found

    assert evaluator.must_lease()["job"] == job.id


def test_whoever_is_not_admitted_any_more_can_do_nothing_under_a_lease(town: Town, anna: Person) -> None:
    """No access list changes; but should a row go, every verb looks again."""
    job = town.publish_sealed(workers=[anna.address])
    lease, delta = anna.must_lease(job), adapter_bytes(numbers(31))
    anna.upload(lease, delta).raise_for_status()
    with town.hub.store.write() as db:
        db.execute(schema.admissions.delete().where(schema.admissions.c.job == job.id))
    here = f"/v1/leases/{lease['lease']}"

    for answer in (
        anna.post(f"{here}/beat"),
        anna.ask_keys(lease),
        anna.upload(lease, adapter_bytes(numbers(32))),
        anna.hand_in(lease, anna.signed(anna.message(lease, delta))),
        anna.get(f"/v1/jobs/{job.id}/contributions"),
    ):
        assert code(answer) == "access.denied"
    assert code(anna.get(f"/v1/objects/{job.sealed.blocks[0][0].sha256}")) == "object.unknown"
    assert town.rows(schema.contributions, job=job.id) == []


def test_an_evaluator_of_the_hub_measures_private_jobs_it_was_not_named_in(town: Town) -> None:
    job, evaluator = town.publish_sealed(held_out=True, workers="owner"), town.person(town.evaluator_keys)
    lease = next(lease for lease in iter(evaluator.lease, None) if lease["job"] == job.id)

    evaluator.post(f"/v1/leases/{lease['lease']}/beat").raise_for_status()
    evaluator.post(f"/v1/leases/{lease['lease']}/evaluation", {"loss": 1.5}).raise_for_status()

    assert [row["loss"] for row in job.view()["evaluations"]] == [1.5]


@pytest.fixture(scope="module")
def worked(town: Town) -> tuple[Job, Person]:
    """A private job with one merged round, one accepted delta and its worker."""
    worker = town.person()
    job = town.publish_sealed(workers=[worker.address, IDLE.address], held_out=True, shards=1, samples=["Who?"])
    evaluator = town.person(town.evaluator_keys)
    answers = iter([["nobody"], ["an adapter"]])
    for _ in range(2):
        lease = next(lease for lease in iter(evaluator.lease, None) if lease["job"] == job.id)
        report = {"loss": 2.0, "samples": next(answers)}
        evaluator.post(f"/v1/leases/{lease['lease']}/evaluation", report).raise_for_status()
        if not town.rows(schema.contributions, job=job.id):
            worker.work(job)
            town.tick()
    return job, worker


def test_what_a_private_job_makes_is_for_its_owner_and_its_workers(
    town: Town, worked: tuple[Job, Person], ben: Person
) -> None:
    job, worker = worked
    delta = town.row(schema.contributions, job=job.id)["delta"]
    for digest in (sha256(INITIAL), delta, job.round(1)["adapter"]):
        path = f"/v1/objects/{digest}"
        if digest != sha256(INITIAL):  # which other jobs of these tests have too
            assert code(anybody(town, path)) == "session.required"
            assert code(ben.get(path)) == "object.unknown"
            assert code(town.person(IDLE).get(path)) == "object.unknown"
        assert sha256(worker.fetch(digest)) == digest
        assert sha256(job.owner.fetch(digest)) == digest
        assert sha256(town.person(town.evaluator_keys).fetch(digest)) == digest
    public = {row["digest"] for row in town.rows(schema.objects, job=job.id) if row["public"]}
    assert public == {job.recipe.spec_hash}


def test_the_initial_adapter_of_a_private_job_is_no_public_one(tmp_path: Any) -> None:
    town = Town(tmp_path)
    job, ben = town.publish_sealed(workers="owner"), town.person()

    assert code(ben.get(f"/v1/objects/{sha256(INITIAL)}")) == "object.unknown"
    assert job.owner.fetch(sha256(INITIAL)) == INITIAL
    town.close()


def test_recipe_and_leaves_of_a_private_job_are_public(town: Town, anna: Person) -> None:
    job = town.publish_sealed(workers=[anna.address], rounds=1, shards=1)
    anna.work(job)
    town.tick()

    (settled,) = job.view()["settlements"]
    for digest in (job.recipe.spec_hash, settled["leaves"]):
        assert sha256(anybody(town, f"/v1/objects/{digest}").content) == digest
    assert anybody(town, f"/v1/jobs/{job.id}/recipe").content == job.recipe.canonical()


def test_ciphertexts_are_for_the_owner_and_for_who_is_at_work(town: Town, anna: Person, ben: Person) -> None:
    job = town.publish_sealed(workers=[anna.address, ben.address], held_out=True)
    anna.must_lease(job)
    assert job.sealed.held_out is not None

    for ref in [job.sealed.blocks[0][0], *job.sealed.base]:
        assert sha256(anna.fetch(ref.sha256)) == ref.sha256
        assert code(ben.get(f"/v1/objects/{ref.sha256}")) == "object.unknown"
    held_out = job.sealed.held_out.sha256
    assert code(anna.get(f"/v1/objects/{held_out}")) == "object.unknown"
    assert sha256(job.owner.fetch(held_out)) == held_out


@pytest.mark.parametrize("private", [True, False])
def test_a_delta_opens_to_no_other_worker_before_its_round_is_merged(
    town: Town, anna: Person, ben: Person, private: bool
) -> None:
    job = town.publish_sealed(workers=[anna.address, ben.address]) if private else town.publish()
    lease, delta = anna.must_lease(job), adapter_bytes(numbers(41 + private))
    other = ben.must_lease(job)
    anna.upload(lease, delta).raise_for_status()
    path = f"/v1/objects/{sha256(delta)}"
    assert code(ben.get(path)) == "object.unknown"
    anna.hand_in(lease, anna.signed(anna.message(lease, delta))).raise_for_status()
    assert code(ben.get(path)) == "object.unknown"
    assert anna.fetch(sha256(delta)) == job.owner.fetch(sha256(delta)) == delta

    ben.contribute(other).raise_for_status()
    town.tick()

    assert ben.fetch(sha256(delta)) == delta


def test_answers_to_samples_are_shown_to_the_owner_alone(town: Town, worked: tuple[Job, Person]) -> None:
    job, worker = worked
    told = [["nobody"], ["an adapter"]]
    path = f"/v1/jobs/{job.id}"

    owners = job.owner.get(path).json()
    assert [row["samples"] for row in owners["evaluations"]] == told
    assert owners["rounds_done"][0]["samples"] == told[1]
    over = town.http.get(town.url + path, headers={"authorization": "Bearer " + "00" * 32})
    for answer in (anybody(town, path), worker.get(path), over):
        assert [row["samples"] for row in answer.json()["evaluations"]] == [None, None]
        assert answer.json()["rounds_done"][0]["samples"] is None
        assert answer.json()["rounds_done"][0]["loss"] == 2.0


def test_a_session_that_is_over_does_not_hide_an_open_job(town: Town, anna: Person) -> None:
    job, headers = town.publish(), {"authorization": "Basic nonsense"}

    assert town.http.get(f"{town.url}/v1/jobs/{job.id}", headers=headers).json()["job"] == job.id


def test_what_was_accepted_is_told_as_it_was_signed(town: Town, anna: Person, ben: Person) -> None:
    job = town.publish(rounds=2, shards=2)
    receipts = [who.work(job) for who in (anna, ben)]
    town.tick()
    receipts.append(anna.work(job))

    answer = town.ask(f"/v1/jobs/{job.id}/contributions")

    assert answer["next"] is None
    assert [(row["round"], row["shard"]) for row in answer["contributions"]] == [(1, 0), (1, 1), (2, 0)]
    domain = eip712.Domain(town.chain.chain_id, town.chain.escrow)
    for row, receipt in zip(answer["contributions"], receipts, strict=True):
        assert row.keys() == {
            "lease", "round", "shard", "worker", "contribution", "signature", "losses", "seconds", "micro_tokens",
            "delta", "reward", "receipt", "accepted", "merged_in", "resolved", "forfeited", "second",
        }  # fmt: skip
        assert {**row["receipt"], "voucher": None, "draw": None} == receipt
        assert (row["resolved"], row["forfeited"], row["second"]) == (0, None, None)
        assert row["contribution"]["deltaHash"] == "0x" + row["delta"]
        assert eip712.recover(domain, "Contribution", row["contribution"], row["signature"]) == row["worker"]
        assert (row["reward"], row["lease"]) == (receipt["amount"], receipt["lease"])
        assert (row["losses"], row["seconds"], row["micro_tokens"]) == ([2.5, 1.5], 1.0, [128] * STEPS)
        assert row["accepted"] == town.clock()
    only = town.ask(f"/v1/jobs/{job.id}/contributions?round=2")["contributions"]
    assert only == answer["contributions"][2:]


def test_contributions_are_told_a_page_at_a_time(town: Town, anna: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = MAX_HELD - 1
    job = town.publish(rounds=1, shards=shards)
    for _ in range(shards):
        anna.work(job)

    def pages(query: str) -> list[list[int]]:
        found, after = [], 0
        while after is not None:
            answer = town.ask(f"/v1/jobs/{job.id}/contributions?{query}&after={after}")
            found.append([row["shard"] for row in answer["contributions"]])
            after = answer["next"]
        return found

    assert pages("limit=3") == [[0, 1, 2], [3, 4, 5], [6]]
    assert pages("limit=7") == pages("") == [list(range(shards))]
    monkeypatch.setattr(views, "MAX_TOLD", STEPS + 3)  # what one contribution tells, and one more number
    assert pages("") == [[0, 1], [2, 3], [4, 5], [6]]


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "round=0", "round=x", "after=-1", f"after={2**70}"])
def test_a_senseless_page_is_refused(town: Town, worked: tuple[Job, Person], query: str) -> None:
    job, worker = worked

    assert code(worker.get(f"/v1/jobs/{job.id}/contributions?{query}")) == "http.bad_request"


def test_contributions_of_a_private_job_are_for_owner_and_admitted_workers(
    town: Town, worked: tuple[Job, Person], ben: Person
) -> None:
    job, worker = worked
    path = f"/v1/jobs/{job.id}/contributions"

    assert code(anybody(town, path)) == "session.required"
    assert code(ben.get(path)) == "access.denied"
    assert job.owner.get(path).json() == worker.get(path).json()
    assert job.owner.get(path).json()["contributions"][0]["worker"] == worker.address
    assert code(anybody(town, f"/v1/jobs/{NEVER}/contributions")) == "job.unknown"


PATHLESS = {"name": "model.safetensors", "sha256": "ab" * 32, "size": 9, "path": None}
DISTANT = {**PATHLESS, "path": "model.safetensors"}
SOURCE = "hf://org/name@" + "12" * 20


def hidden(**changes: Any) -> dict[str, Any]:
    return {"source": None, "file": None, "format": "text", "rows": 9, **changes}


def a_base(source: str | None, *files: dict[str, Any]) -> dict[str, Any]:
    return {"source": source, "license": None, "files": list(files)}


HELD_OUT = {"rows": 3, "tokens": 40, "supervised": 30}
SEALED_WRONG: dict[str, dict[str, Any]] = {
    "sealed, and no keys": {"access": {"workers": "anyone", "keys": None}},
    "keys, and not sealed": {"sealed": None},
    "a round of blocks too few": {"sealed": {"blocks": lambda blocks: blocks[:-1]}},
    "a shard of blocks too many": {"sealed": {"blocks": lambda blocks: [[*row, PATHLESS] for row in blocks]}},
    "a data set's file in clear": {"datasets": [hidden(file=PATHLESS)]},
    "held-out rows in clear": {"held_out": {**HELD_OUT, "dataset": hidden(file=PATHLESS)}},
    "held-out rows that nothing holds": {"held_out": {**HELD_OUT, "dataset": hidden()}},
    "a sealed held-out file that nothing is judged by": {"sealed": {"held_out": PATHLESS}},
    "no base": {"sealed": {"base": []}},
    "a base in clear": {"sealed": {"base": []}, "base_model": a_base(None, PATHLESS)},
    "a base twice": {"base_model": a_base(None, PATHLESS)},
    "a base both sealed and elsewhere": {"base_model": a_base(SOURCE, DISTANT)},
    "a base elsewhere, without files": {"sealed": {"base": []}, "base_model": a_base(SOURCE)},
    "two base files of one name": {"sealed": {"base": [PATHLESS, {**PATHLESS, "sha256": "cd" * 32}]}},
    "a block with a path": {
        "sealed": {"blocks": lambda blocks: [[{**ref, "path": "a"} for ref in row] for row in blocks]}
    },
    "a sealed base file with a path": {"sealed": {"base": [DISTANT]}},
    "an initial adapter with a path": {"lora": {"initial": DISTANT}},
    "a block of more than a tebibyte": {
        "sealed": {"blocks": lambda blocks: [[{**ref, "size": 2**40 + 1} for ref in row] for row in blocks]}
    },
    "more files than are taken": {
        "sealed": {"base": [{**PATHLESS, "name": f"f{i}", "sha256": f"{i:064x}"} for i in range(1000)]}
    },
}  # fmt: skip
OPEN_WRONG: dict[str, dict[str, Any]] = {
    "workers of the owner's choice": {"access": {"workers": "owner", "keys": None}},
    "a list of workers": {"access": {"workers": ["0x" + "11" * 20], "keys": None}},
    "a data set without a file": {"datasets": [hidden()]},
    "held-out rows without a file": {"held_out": {**HELD_OUT, "dataset": hidden()}},
    "a source, and a file without a path": {"base_model": a_base(SOURCE, PATHLESS)},
    "a path, and no source": {"base_model": a_base(None, DISTANT)},
    "data of a source without a path": {"datasets": [hidden(source=SOURCE, file=PATHLESS)]},
    "data with a path and no source": {"datasets": [hidden(file=DISTANT)]},
    "a file of a source of more than a tebibyte": {"base_model": a_base(SOURCE, {**DISTANT, "size": 2**40 + 1})},
    "more data sets than are taken": {"datasets": [hidden(file=PATHLESS)] * 1000},
}


def changed(made: Any, changes: dict[str, Any]) -> Any:
    out = dict(made)
    for key, value in changes.items():
        if callable(value):
            out[key] = value(out[key])
        elif isinstance(value, dict) and isinstance(out[key], dict):
            out[key] = changed(out[key], value)
        else:
            out[key] = value
    return out


@pytest.mark.parametrize("name", [*SEALED_WRONG, *OPEN_WRONG])
def test_a_recipe_is_refused_with(town: Town, anna: Person, name: str) -> None:
    files = seal_files(rounds=2, shards=2, held_out=False, base=True)
    made = sealed_recipe(files) if name in SEALED_WRONG else town.publish().recipe
    document = changed(made.model_dump(mode="json"), {**SEALED_WRONG, **OPEN_WRONG}[name])
    before = town.rows(schema.jobs)

    assert code(anna.post("/v1/jobs", {"recipe": document, "salt": NEVER})) == "job.invalid"

    assert town.rows(schema.jobs) == before


def test_a_sealed_job_has_at_most_so_many_blocks(town: Town, anna: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainchain.core.hub.jobs.MAX_BLOCKS", 3)
    files = seal_files(rounds=2, shards=2, held_out=False, base=True)
    document = {"recipe": sealed_recipe(files).model_dump(mode="json"), "salt": NEVER}

    assert code(anna.post("/v1/jobs", document)) == "job.invalid"


def test_blocks_do_not_count_as_files(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainchain.core.hub.jobs.MAX_FILES", 4)

    assert town.publish_sealed(rounds=2, shards=3, held_out=True).state == "running"


def test_what_has_a_source_is_never_asked_of_the_owner_nor_of_the_source(town: Town, anna: Person) -> None:
    source, ref = SOURCE.replace("hf://", "hf://datasets/"), {**PATHLESS, "name": "train.jsonl", "path": "train.jsonl"}
    made = town.publish().recipe.model_dump(mode="json")
    document = {
        **made,
        "base_model": a_base(SOURCE, DISTANT),
        "datasets": [hidden(source=source, file={**ref, "sha256": "cd" * 32})],
    }

    answer = anna.post("/v1/jobs", {"recipe": document, "salt": NEVER}).raise_for_status().json()

    assert answer["missing"] == [sha256(INITIAL)]
    objects = {row["digest"] for row in town.rows(schema.objects, job=answer["job"])}
    assert objects == {sha256(INITIAL), answer["spec_hash"]}


def test_a_sealed_job_may_have_a_base_from_a_source(town: Town, anna: Person) -> None:
    job = town.publish_sealed(base=False, workers=[anna.address], rounds=1, shards=1)

    lease = anna.must_lease(job)

    assert anna.opened(lease, anna.ask_keys(lease)).keys() == {job.sealed.blocks[0][0].sha256}
