"""Every step of the recount, and every fraud that it must name: plain values, signatures that are names."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest

from tests.fixtures_card import CHAIN, HUB, JOB, OWNER, a_job, told
from trainchain.core.balance import Balance, Settled, balance
from trainchain.core.errors import TrainChainError
from trainchain.core.history import Accepted, Chain, History, parse
from trainchain.core.models import ResolvedRecipe
from trainchain.core.recount import (
    CHAIN as ON_CHAIN,
)
from trainchain.core.recount import (
    LEAVES,
    REWARDS,
    ROOT,
    Finding,
    Leaves,
    Line,
    OnChain,
    Sums,
    earned,
    leaves,
    listed,
    money,
    promised,
    roots,
    rules,
    table,
    verdicts,
)
from trainchain.core.rewards import Earned, Terms, recount, shard_reward

ANNA, BEN = "0x" + "a" * 40, "0x" + "b" * 40
RECIPE = a_job()
FREE = 2**128 - 1


def recover(chain: Chain, kind: str, fields: Mapping[str, Any], signature: str) -> str:
    """Who signed is what the signature says, as long as it is one for this escrow."""
    if not signature.startswith("0x") or chain.escrow != CHAIN.escrow:
        raise TrainChainError("contribution.bad_signature", "That is no signature.")
    return signature


def row(round_: int, shard: int, worker: str, place: int, /, **changes: Any) -> Accepted:
    """An accepted contribution as an honest hub tells of it; `changes` go into its receipt or, by name, beside it."""
    fields = {
        "jobId": JOB,
        "round": round_,
        "shard": shard,
        "lease": "0x" + f"{16 * round_ + shard:064x}",
        "worker": worker,
        "deltaHash": "0x" + "cd" * 32,
    }
    signed = {"startHash": JOB, "stateRoot": JOB, "encoding": "fp32", "numericClass": "x"}
    outside = {name: changes.pop(name) for name in ("signature", "merged_in", "contribution") if name in changes}
    amount = shard_reward(RECIPE, min(round_, RECIPE.rounds), min(shard, RECIPE.all_shards - 1))
    bound = {"hub": HUB, "chain_id": CHAIN.chain_id, "escrow": CHAIN.escrow, "signature": HUB}
    document = {
        "signature": worker,
        "merged_in": round_,
        **outside,
        "contribution": {**fields, **signed, **outside.get("contribution", {})},
        "receipt": {**fields, "amount": str(amount), "place": place, **bound, **changes},
    }
    return parse(Accepted, document, code="hub.not_a_hub", what="A contribution")


def honest() -> list[Accepted]:
    return [row(1, 0, ANNA, 1), row(1, 1, BEN, 1), row(2, 0, ANNA, 2), row(2, 1, ANNA, 3)]


def recounted(rows: list[Accepted], **options: Any) -> tuple[list[Earned], list[Finding]]:
    return earned(RECIPE, JOB, CHAIN, rows, recover, **options)


def price(round_: int, shard: int, recipe: ResolvedRecipe = RECIPE) -> int:
    return shard_reward(recipe, round_, shard)


def test_honest_contributions_earn_what_the_recipe_gives() -> None:
    rows, found = recounted(honest())

    assert found == []
    assert [(one.worker, one.place, one.amount) for one in rows] == [
        (ANNA, 1, price(1, 0)), (BEN, 1, price(1, 1)), (ANNA, 2, price(2, 0)), (ANNA, 3, price(2, 1))
    ]  # fmt: skip


WRONG: dict[str, tuple[Accepted, str]] = {
    "signed by another": (
        row(1, 0, ANNA, 1, signature=BEN),
        f"of round 1, shard 0, by {ANNA}, is signed by {BEN}",
    ),
    "signed by nobody": (row(1, 0, ANNA, 1, signature="x"), "is signed by nobody"),
    "another amount": (row(1, 0, ANNA, 1, amount="7"), "promises 0.000000000000000007; the recipe gives"),
    "another escrow": (row(1, 0, ANNA, 1, escrow=OWNER), f"is bound to another escrow, {OWNER}"),
    "another chain": (row(1, 0, ANNA, 1, chain_id=1), "on chain 1"),
    "another's receipt": (row(1, 0, ANNA, 1, worker=BEN), f"receipt of round 1, shard 0, by {ANNA}, is of another"),
    "another delta's receipt": (row(1, 0, ANNA, 1, deltaHash=JOB), "is of another contribution"),
    "another job": (row(1, 0, ANNA, 1, contribution={"jobId": "0x" + "12" * 32}), "is not of this job"),
    "a round that is not": (row(3, 0, ANNA, 1), "is not of this job"),
    "a shard that is not": (row(1, 2, ANNA, 1), "is not of this job"),
    "counted before": (row(2, 0, ANNA, 1, merged_in=1), "counts with round 1, which takes nothing of round 2 in"),
    "counted never": (row(1, 0, ANNA, 1, merged_in=None), "counts with round None"),
    "not the first": (row(1, 0, ANNA, 2), f"{ANNA} has 1 accepted shards at the places 2: none is at place 1"),
    "far from the first": (row(1, 0, ANNA, 2**62), "none is at place 1"),
}


@pytest.mark.parametrize("name", sorted(WRONG))
def test_each_wrong_contribution_is_named(name: str) -> None:
    wrong, says = WRONG[name]
    _, found = recounted([wrong])

    assert [one.code for one in found] == [REWARDS]
    assert says in found[0].says
    assert found[0].error().exit_code == 4


def test_a_receipt_counts_that_the_hub_of_then_signed() -> None:
    old = row(1, 0, ANNA, 1)
    old = old.model_copy(update={"receipt": old.receipt.model_copy(update={"signature": OWNER})})

    assert recounted([old], hubs={OWNER.lower()})[1] == []
    (finding,) = recounted([old])[1]
    assert finding.says.endswith(f"is signed by {OWNER}, not by the job's hub {HUB}.")


def test_a_worker_s_name_is_the_one_that_it_signs_with() -> None:
    loud = "0x" + "A" * 40
    rows, found = recounted([row(1, 0, loud, 1, signature=ANNA), row(1, 1, ANNA, 2)])

    assert found == []
    assert {one.worker for one in rows} == {ANNA}
    again = view([row(1, 0, ANNA, 1), row(1, 1, ANNA, 2)])
    assert verdicts(again, [row(1, 0, loud, 1), row(1, 1, ANNA, 2)], again) == []


def test_a_late_contribution_counts_with_the_next_round_and_the_last_with_its_own() -> None:
    assert recounted([row(1, 0, ANNA, 1, merged_in=2)])[1] == []
    assert recounted([row(2, 0, ANNA, 1, merged_in=None)])[1] == []
    assert recounted([row(2, 0, ANNA, 1, merged_in=None)])[0][0].counted == 2


def test_all_that_is_wrong_is_named_and_not_the_first_alone() -> None:
    rows = honest()
    again = [*rows[:2], rows[0], rows[3], row(2, 0, BEN, 1, amount="1")]
    _, found = recounted(again)

    texts = [one.says for one in found]
    assert len(texts) == 4
    assert "round 1, shard 0 is told of twice" in texts[0]
    assert "promises" in texts[1]
    assert texts[2].startswith(f"{ANNA} has 2 accepted shards at the places 1, 3: none is at place 2")
    assert texts[3].startswith(f"{BEN} has 2 accepted shards at the places 1, 1: none is at place 2")


def test_places_follow_the_order_in_which_shards_count() -> None:
    _, found = recounted([row(2, 0, ANNA, 1), row(1, 0, ANNA, 2)])

    assert [
        one.says.startswith(f"{ANNA} has accepted shards at places that are not in the order") for one in found
    ] == [True]


def view(rows: list[Accepted], **changes: Any) -> History:
    """What an honest hub shows of a job in which these were accepted."""
    by_round: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for one in rows:
        shard = {"shard": one.which[1], "state": "accepted", "worker": one.contribution.worker}
        by_round[one.which[0]].append({**shard, "merged_in": one.merged_in})
    rounds = [
        {
            "round": number,
            "state": "merged",
            "start": "0" * 64,
            "adapter": "0" * 64,
            "merge_error": 0.0,
            "shards": shards,
        }
        for number, shards in by_round.items()
    ]
    return told(RECIPE, rounds_done=rounds, **changes)


def test_the_hub_s_view_and_the_contributions_must_be_the_same() -> None:
    rows = honest()
    whole = view(rows)

    assert verdicts(whole, rows, whole) == []
    (lost,) = verdicts(whole, rows[1:], whole)
    assert (lost.code, lost.says) == (
        REWARDS,
        f"Round 1, shard 0 is accepted of {ANNA}, and its contribution is not told of.",
    )
    (odd,) = verdicts(view(rows[1:]), rows, view(rows[1:]))
    assert f"round 1, shard 0 by {ANNA} is told of, and the shard is not accepted" in odd.says
    (other,) = verdicts(whole, [row(1, 0, BEN, 1), *rows[1:]], whole)
    assert other.says == f"Round 1, shard 0 is by {BEN} and counts with round 1; as accepted, {ANNA} and 1."
    assert len(verdicts(whole, [row(1, 0, ANNA, 1, merged_in=2), *rows[1:]], whole)) == 1
    assert len(verdicts(whole, [], whole)) == 4


def test_a_job_that_went_on_meanwhile_is_not_accused() -> None:
    rows = honest()

    assert verdicts(view(rows[:2]), rows[:3], view(rows)) == []
    assert len(verdicts(view(rows[:2]), rows[1:3], view(rows))) == 1


def test_a_receipt_that_somebody_holds_must_be_told_of() -> None:
    rows = honest()
    kept = [one.receipt for one in rows]
    forged = row(1, 1, ANNA, 4, signature=ANNA).receipt.model_copy(update={"signature": ANNA})

    assert promised(rows, [*kept, forged], CHAIN, recover) == []
    (lost,) = promised(rows[1:], kept, CHAIN, recover)
    assert lost.says.startswith(f"{ANNA} holds a signed receipt of")
    assert "round 1, shard 0, place 1" in lost.says
    (better,) = promised([row(1, 0, ANNA, 1, amount="1"), *rows[1:]], kept, CHAIN, recover)
    assert better.code == REWARDS


def file(amounts: Mapping[str, int], number: int, *, ended: bool = True, limit: int = FREE, **changes: Any) -> Leaves:
    values = {
        "job": JOB,
        "terms": Terms(number, ended, limit),
        "root": f"root {number}",
        "total": sum(amounts.values()),
    }
    return Leaves(**{**values, "amounts": amounts, **changes})


def a_long_job() -> list[Earned]:
    """Anna has twelve shards in four rounds and Ben three, each worth ten more than the one before."""
    rows: list[Earned] = []
    places = {ANNA: 0, BEN: 0}
    for number in range(1, 5):
        for shard in range(4 if number < 4 else 3):
            worker = BEN if shard == 3 else ANNA
            places[worker] += 1
            rows.append(Earned(number, shard, worker, places[worker], 100 + 10 * len(rows), number))
    return rows


def due(*terms: Terms) -> dict[int, Leaves | None]:
    return {
        one.number: file(amounts, one.number, ended=one.ended, limit=one.limit)
        for one, amounts in zip(terms, recount(a_long_job(), terms), strict=True)
    }


TERMS = (Terms(4, False, FREE), Terms(5, True, 700), Terms(6, True, 900), Terms(7, True, FREE))


def test_settlements_that_follow_from_the_rewards_hold() -> None:
    files = due(*TERMS)

    assert [file.total for file in files.values() if file] == [
        sum(one.values()) for one in recount(a_long_job(), TERMS)
    ]
    assert leaves(JOB, a_long_job(), files) == []
    assert leaves(JOB, a_long_job(), {}) == []


@pytest.mark.parametrize("number", [4, 5, 6, 7])
@pytest.mark.parametrize("change", [-1, 1])
def test_a_changed_amount_is_named(number: int, change: int) -> None:
    files = due(*TERMS)
    held = files[number]
    assert held is not None
    files[number] = held._replace(amounts={**held.amounts, ANNA: held.amounts[ANNA] + change})

    (finding,) = leaves(JOB, a_long_job(), files)

    assert finding.code == LEAVES
    assert finding.says.startswith(f"Settlement {number} owes {ANNA} ")


def test_a_dropped_worker_and_one_that_earned_nothing_are_named() -> None:
    files, thief = due(*TERMS), "0x" + "c" * 40
    held = files[7]
    assert held is not None
    files[7] = held._replace(amounts={ANNA: held.amounts[ANNA], thief: 5})

    found = leaves(JOB, a_long_job(), files)

    assert len(found) == 2
    assert found[0].says.startswith(f"Settlement 7 leaves out {BEN}; ")
    assert found[1].says == f"Settlement 7 owes {thief} 0.000000000000000005; by what had vested for it, it is owed 0."


def test_a_file_of_another_settlement_or_job_is_named() -> None:
    files = due(*TERMS)
    held = files[7]
    assert held is not None

    (finding,) = leaves(JOB, a_long_job(), {**files, 7: held._replace(job="0x" + "11" * 32)})
    assert "is settlement 7 of job 0x1111" in finding.says
    (finding,) = leaves(JOB, a_long_job(), {**files, 8: held})
    assert finding.says.startswith("The leaves file of settlement 8 is settlement 7 of job")


def test_after_a_file_that_cannot_be_had_there_are_bounds() -> None:
    files = due(*TERMS)
    last, before = files[7], files[6]
    assert last is not None
    assert before is not None
    lost = {**files, 5: None}

    assert leaves(JOB, a_long_job(), lost) == []
    (low,) = leaves(
        JOB, a_long_job(), {**lost, 7: last._replace(amounts={**last.amounts, ANNA: before.amounts[ANNA] - 1})}
    )
    assert low.says.startswith(f"Settlement 7 owes {ANNA}")
    assert "it was owed" in low.says
    (high,) = leaves(
        JOB, a_long_job(), {**lost, 7: last._replace(amounts={**last.amounts, ANNA: last.amounts[ANNA] + 1})}
    )
    assert "had vested for it" in high.says


def test_a_part_of_the_contributions_bounds_what_is_settled_later() -> None:
    """As the evidence beside an earlier adapter has it."""
    files = due(*TERMS)
    early = [one for one in a_long_job() if one.counted <= 3]

    assert leaves(JOB, early, files, known=3) == []
    (fell,) = leaves(JOB, a_long_job(), {4: files[4], 9: file({BEN: 1}, 9)}, known=4)
    assert fell.says.startswith(f"Settlement 9 owes {ANNA} 0; it was owed")


def test_the_rules_that_a_settlement_names_must_be_its_to_name() -> None:
    going, ended = file({ANNA: 1}, 2, ended=False, limit=10), file({ANNA: 1}, 3, limit=10)

    assert rules([going, ended], cap=10, merged=2, over=True) == []
    assert rules([], cap=0, merged=0, over=False) == []
    for files, options, says in (
        ([going], {"cap": 9, "merged": 2, "over": False}, "Settlement 2 allowed itself to add"),
        (
            [going],
            {"cap": 10, "merged": 1, "over": False},
            "Settlement 2 says that round 2 is merged; the last that is, is 1",
        ),
        ([ended], {"cap": 10, "merged": 2, "over": False}, "Settlement 3 pays as if the job had ended, and it goes on"),
        (
            [ended, file({ANNA: 1}, 4, ended=False, limit=1)],
            {"cap": 10, "merged": 9, "over": True},
            "Settlement 4 pays as if the job went on; by settlement 3 it had ended",
        ),
    ):
        (finding,) = rules(files, **options)  # type: ignore[arg-type]
        assert finding.code == LEAVES
        assert finding.says.startswith(says)


def test_roots_and_totals_are_those_of_the_leaves() -> None:
    files = due(*TERMS)
    chain = [OnChain(number, held.root, held.total) for number, held in files.items() if held]

    assert roots(chain, files) == []
    assert roots(chain, dict.fromkeys(files)) == []
    for change, says in (
        ({"root": "another"}, "Settlement 7 has the root another; its leaves have root 7."),
        ({"total": chain[3].total + 3}, "its leaves add up to"),
        ({"total": chain[3].total - 1}, "0.000000000000000001 are not covered."),
    ):
        (finding,) = roots([*chain[:3], chain[3]._replace(**change)], files)  # type: ignore[arg-type]
        assert finding.code == ROOT
        assert says in finding.says
    steps = [after.total - before.total for before, after in pairwise(chain)]
    assert roots(chain, files, cap=max(chain[0].total, *steps)) == []
    assert "Settlement 7 raises the total by" in roots(chain, files, cap=max(chain[0].total, *steps) - 1)[0].says
    assert "Settlement 5 lowers the total" in roots([chain[1]._replace(total=1), chain[0]], {})[0].says


def test_the_hub_s_list_of_settlements_is_the_chain_s() -> None:
    hub = told(RECIPE).settlements
    chain = [Settled(one.round, one.root, one.total, "0x" + one.leaves, one.tx, 0) for one in hub]

    assert listed(hub, chain) == []
    assert listed(hub, chain[:1]) == []
    for change in ({"root": JOB}, {"total": 1}, {"leaves": "0" * 64}):
        (finding,) = listed([hub[0].model_copy(update=change)], chain)
        assert finding.code == ROOT
        assert finding.says.endswith("; on chain there is another one of that number.")
    (gap,) = listed(hub, chain[1:])
    assert gap.says.endswith("; on chain there is none of that number.")


class Entry:
    def __init__(self, name: str, **args: Any) -> None:
        self.name, self.args, self.tx = name, args, "0x"


LOG = [
    Entry("JobCreated", hub=HUB, amount=1000),
    Entry("Funded", amount=500),
    Entry("Settled", round=1, root="a", total=300, dataHash="b"),
    Entry("Claimed", account=ANNA, amount=100),
    Entry("VoucherRedeemed", account=BEN, amount=50),
    Entry("HubProposed", hub=OWNER, activeAt=100),
    Entry("Settled", round=2, root="c", total=400, dataHash="d"),
    Entry("AdvanceCounted", account=BEN, amount=20),
    Entry("Claimed", account=BEN, amount=60),
    Entry("Reclaimed", amount=70),
    Entry("Closed"),
]


def test_the_log_adds_up_to_what_the_escrow_says() -> None:
    found = balance(LOG)

    assert (found.funded, found.refunded, found.total, found.advances, found.claimed) == (1500, 70, 400, 30, 210)
    assert found.settled == 430
    assert found.paid == {ANNA: 100, BEN: 110}
    assert [(one.number, one.free) for one in found.settlements] == [(1, 1500), (2, 1150)]
    assert found.hubs == [(HUB, 0), (OWNER, 100)]


def test_a_hub_that_was_named_was_one_only_if_it_came_into_office() -> None:
    def served(present: str, *named: tuple[str, int]) -> set[str]:
        proposals = [Entry("HubProposed", hub=hub, activeAt=at) for hub, at in named]
        return balance([LOG[0], *proposals]).served(present, grace=10)

    assert served(HUB) == {HUB}
    assert served(HUB, (OWNER, 20)) == {HUB}
    assert served(OWNER, (OWNER, 20)) == {HUB, OWNER}
    assert served(OWNER, (OWNER, 20), (HUB, 30)) == {HUB, OWNER}, "named again, it still was the hub at first"
    assert served(HUB, (OWNER, 20), (HUB, 29)) == {HUB}, "taken back before its time came"
    assert served(HUB, (OWNER, 20), (HUB, 30)) == {HUB, OWNER}, "in office for no longer than a second"


def test_nobody_is_paid_more_than_had_vested_for_it() -> None:
    rows = [Earned(1, shard, ANNA, shard + 1, 100, 1) for shard in range(11)] + [Earned(1, 20, BEN, 1, 50, 1)]
    held = balance(LOG)
    state = Sums(1500, 70, 400, 210)

    going = table(rows, None, held.paid, over=False)
    over = table(rows, file({ANNA: 1100, BEN: 50}, 2), held.paid, over=True)

    assert going == [Line(ANNA, 11, 1100, 200, 0, 100), Line(BEN, 1, 50, 0, 0, 110)]
    assert over == [Line(ANNA, 11, 1100, 1100, 1100, 100), Line(BEN, 1, 50, 50, 50, 110)]
    (finding,) = money(over, held, state)
    assert (finding.code, finding.says) == (
        ON_CHAIN,
        f"{BEN} was paid 0.00000000000000011; 0.00000000000000005 had vested of what it earned.",
    )
    assert money(over[:1], held, state) == []


def test_sums_of_the_escrow_that_cannot_be_are_named() -> None:
    empty = Balance(100, 0, 40, 0, {ANNA: 41}, [], [])

    (more,) = money([], empty, Sums(100, 0, 40, 41))
    assert more.says.startswith("The escrow has paid 0.000000000000000041 of 0.00000000000000004 settled")
    (over,) = money([], empty._replace(total=90, refunded=20), Sums(100, 20, 90, 41))
    assert "less 0.00000000000000002 given back" in over.says
    (kept,) = money([], empty._replace(total=60), Sums(100, 0, 60, 55))
    assert kept.says == (
        "The escrow says 0.000000000000000055 claimed; its log adds up to 0.000000000000000041: "
        "a part of the log is kept back."
    )
