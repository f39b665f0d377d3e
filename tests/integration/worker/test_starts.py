"""What a worker fetches to start from, from a real hub: the encoded step where it has the adapter before, else all."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.fixtures_hub import INITIAL, SHAPES, Job, Person, Town, numbers
from tests.fixtures_merge import PLAIN_MERGE
from trainchain.core.adapter import adapter_bytes, apply, read_adapter
from trainchain.core.client import HubClient
from trainchain.core.digests import sha256
from trainchain.core.encodings import decode, encode, encoded_size
from trainchain.core.messages import Lease
from trainchain.core.models import parse
from trainchain.core.segments import Moments
from trainchain.core.worker.cache import Cache
from trainchain.core.worker.starts import fetch_start

HANDING_ON = PLAIN_MERGE.model_copy(update={"encoding": "int4", "moments": "merged"})
STEP_SIZE = encoded_size("int4", SHAPES, moments=True)


@pytest.fixture
def anna(town: Town) -> Person:
    return town.person()


@pytest.fixture
def client(anna: Person) -> Iterator[HubClient]:
    made = anna.client()
    yield made
    made.close()


@pytest.fixture
def job(town: Town) -> Job:
    return town.publish(rounds=3, shards=2, merge=HANDING_ON)


def file_of(seed: int) -> bytes:
    """A delta with moments, of gradients that were clipped at 1."""
    m = numbers(seed + 1, 0.01)
    return encode(numbers(seed), "int4", Moments(m, {name: np.square(tensor) + 1e-6 for name, tensor in m.items()}))


def train(job: Job, person: Person, seed: int) -> None:
    """All shards of a round."""
    for at in range(job.recipe.shards):
        person.contribute(person.must_lease(job), file_of(seed + 10 * at), encoding="int4").raise_for_status()
    job.town.tick()


def leased(job: Job, person: Person) -> Lease:
    return parse(Lease, person.must_lease(job), code="hub.not_a_hub", what="The lease")


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    made = Cache(tmp_path / "cache")
    yield made
    made.let_go()


def test_the_first_round_starts_from_the_initial_adapter_alone(
    job: Job, anna: Person, client: HubClient, cache: Cache
) -> None:
    lease = leased(job, anna)

    start = fetch_start(cache, client, lease, job.recipe)

    assert (start.adapter.read_bytes(), start.outer_step) == (INITIAL, None)
    assert (lease.before, lease.outer_step) == (None, None)


def test_who_stays_fetches_the_encoded_steps_alone(job: Job, anna: Person, client: HubClient, cache: Cache) -> None:
    first = leased(job, anna)
    fetch_start(cache, client, first, job.recipe)
    anna.request("DELETE", f"/v1/leases/{first.lease}").raise_for_status()
    train(job, anna, 0)
    lease, had = leased(job, anna), client.received

    start = fetch_start(cache, client, lease, job.recipe)

    assert start.outer_step is not None
    assert sha256(start.adapter.read_bytes()) == lease.start == job.round(2)["start"]
    step = decode(start.outer_step.read_bytes(), "int4", SHAPES, moments=True)
    assert adapter_bytes(apply(read_adapter(INITIAL), step.delta)) == start.adapter.read_bytes()
    assert step.moments is not None
    assert any(tensor.any() for tensor in step.moments.m.values())
    assert STEP_SIZE <= client.received - had < STEP_SIZE + len(INITIAL)


def test_who_comes_late_fetches_the_adapter_whole(job: Job, anna: Person, client: HubClient, cache: Cache) -> None:
    train(job, anna, 0)
    train(job, anna, 100)
    lease = leased(job, anna)

    start = fetch_start(cache, client, lease, job.recipe)

    assert sha256(start.adapter.read_bytes()) == lease.start == job.round(3)["start"]
    assert start.outer_step is not None
    assert sha256(start.outer_step.read_bytes()) == lease.outer_step == job.round(2)["outer_step"]


def test_a_step_that_leads_elsewhere_is_not_believed(job: Job, anna: Person, client: HubClient, cache: Cache) -> None:
    cache.keep(sha256(INITIAL), INITIAL)
    train(job, anna, 0)
    train(job, anna, 100)
    lease = leased(job, anna).model_copy(update={"before": sha256(INITIAL)})

    start = fetch_start(cache, client, lease, job.recipe)

    assert sha256(start.adapter.read_bytes()) == lease.start


def test_a_delta_without_moments_is_refused_where_they_are_handed_on(job: Job, anna: Person) -> None:
    answer = anna.contribute(anna.must_lease(job), encode(numbers(1), "int4"), encoding="int4")

    assert (answer.status_code, answer.json()["code"]) == (422, "delta.missing_tensor")


@pytest.mark.parametrize(("m", "v", "which"), [(3.0, 0.01, "first"), (0.01, 9.0, "second")])
def test_moments_of_gradients_that_nobody_clipped_are_refused(
    job: Job, anna: Person, m: float, v: float, which: str
) -> None:
    wild = Moments(
        {name: np.full(shape, m, np.float32) for name, shape in SHAPES.items()},
        {name: np.full(shape, v, np.float32) for name, shape in SHAPES.items()},
    )

    answer = anna.contribute(anna.must_lease(job), encode(numbers(1), "int4", wild), encoding="int4")

    assert answer.json()["code"] == "delta.out_of_reach"
    assert f"The {which} moment" in answer.json()["detail"]
