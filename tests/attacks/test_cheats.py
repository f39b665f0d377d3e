"""Who did not train what was asked for is rejected by every segment that was not, and by none that was.

The engine is real, and so is the decision: structure first, then the replays of two auditors, in the worker's own
numeric class (where equality is demanded) and in another (where the recipe's tolerance decides).
"""

import numpy as np
import pytest

from tests.attacks import cheats
from tests.attacks.conftest import Scene
from tests.attacks.lab import Claim, Lab, moved
from trainchain.core.segments import state_digests

PASSED, DIFFERS = "audit.passed", "audit.differs"
SAMPLE = ("an eighth of the batch dropped", "learning rate x0.9")
"""What a bf16 job is tried with every day; the others take longer."""


@pytest.fixture(params=["fp32", pytest.param("bf16", marks=pytest.mark.long)])
def scene(request: pytest.FixtureRequest) -> Scene:
    found: Scene = request.getfixturevalue(request.param)
    return found


def is_told_apart(scene: Scene, claim: Claim) -> None:
    """By the cheat's own word of what is forged, in both classes; whatever else the cheap checks refused before."""
    wanted = [DIFFERS if segment in claim.forged else PASSED for segment in range(scene.lab.count)]
    for engine in (None, scene.other_class):
        assert [scene.lab.decided(claim, segment, engine) for segment in range(scene.lab.count)] == wanted
        found = scene.lab.verdicts(claim, engine)
        assert found == wanted or set(found) == {"delta.out_of_reach"}


def differs_from_honest(lab: Lab, claim: Claim) -> None:
    """No cheat in name only: each forged segment's end is not what training from its start gives."""
    for segment in claim.forged:
        end = lab.replay(claim, segment)
        assert state_digests(end) != state_digests(claim.states[segment + 1])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_who_trains_passes_in_every_class(precision: str, request: pytest.FixtureRequest) -> None:
    scene: Scene = request.getfixturevalue(precision)
    claim = cheats.honest(scene.lab)

    assert scene.lab.verdicts(claim) == [PASSED] * 4
    assert scene.lab.verdicts(claim, scene.other_class) == [PASSED] * 4
    assert any(scene.lab.distances(claim, at, scene.other_class).delta > 0 for at in range(4)), "the same class"
    assert min(moved(claim.states)) > 0
    assert np.isfinite(moved(claim.states)).all()


@pytest.mark.parametrize("name", cheats.FULL)
def test_a_shard_that_is_forged_throughout_is_rejected_wherever_it_is_drawn(scene: Scene, name: str) -> None:
    claim = cheats.FULL[name](scene.lab)

    assert claim.forged == set(range(scene.lab.count))
    differs_from_honest(scene.lab, claim)
    is_told_apart(scene, claim)


@pytest.mark.parametrize("name", cheats.PARTIAL)
def test_a_shard_that_is_forged_in_part_is_rejected_by_exactly_that_part(scene: Scene, name: str) -> None:
    claim = cheats.PARTIAL[name](scene.lab)

    assert 0 < len(claim.forged) < scene.lab.count
    differs_from_honest(scene.lab, claim)
    is_told_apart(scene, claim)


@pytest.mark.parametrize("name", SAMPLE)
def test_a_bf16_job_is_not_cheated_either(bf16: Scene, name: str) -> None:
    is_told_apart(bf16, cheats.FULL[name](bf16.lab))


def test_a_lazy_worker_s_share_is_what_was_said(fp32: Scene) -> None:
    assert [len(cheats.lazy(share)(fp32.lab).forged) for share in (0.25, 0.5, 0.75)] == [1, 2, 3]


@pytest.mark.parametrize("name", cheats.STRUCTURAL)
def test_what_hashes_show_needs_no_replay(scene: Scene, name: str) -> None:
    cheat, code = cheats.STRUCTURAL[name]

    assert scene.lab.verdicts(cheat(scene.lab)) == [code] * scene.lab.count


def test_a_base_of_few_bits_is_no_base(fp32: Scene) -> None:
    """int8 is far outside of fp32's tolerance; int4 and bf16 further still."""
    for engine in (fp32.variant(bits=8), fp32.variant(bits=4), fp32.variant(precision="bf16")):
        claim = cheats.on_another_base(lambda lab, engine=engine: engine)(fp32.lab)
        is_told_apart(fp32, claim)


@pytest.mark.long
def test_int4_is_seen_in_bf16_too(bf16: Scene) -> None:
    is_told_apart(bf16, cheats.on_another_base(lambda lab: bf16.variant(bits=4))(bf16.lab))


def test_int8_in_a_bf16_job_is_within_the_tolerance(bf16: Scene) -> None:
    """A known limit: rounding the base to int8 changes no more than bf16's own rounding does. It saves memory, and the
    adapter is no worse for it."""
    claim = cheats.on_another_base(lambda lab: bf16.variant(bits=8))(bf16.lab)

    assert bf16.lab.verdicts(claim) == [PASSED] * 4
    assert bf16.lab.verdicts(claim, bf16.other_class) == [PASSED] * 4


@pytest.mark.long
def test_more_precision_than_asked_for_is_within_the_tolerance(bf16: Scene) -> None:
    """Known, and harmless: who computes a bf16 job in fp32 does more than was asked."""
    claim = cheats.on_another_base(lambda lab: bf16.variant(precision="fp32"))(bf16.lab)

    assert bf16.lab.verdicts(claim, bf16.other_class) == [PASSED] * 4
