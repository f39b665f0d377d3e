"""An audit's replays beside its claim: how far they are from it, and from each other, and what they say together."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection, select

from trainchain.core.adapter import Adapter, read_adapter, tensor_specs
from trainchain.core.checks import reach
from trainchain.core.encodings import decode
from trainchain.core.evidence import Measured, ReplayEvidence
from trainchain.core.hub import schema, states
from trainchain.core.hub.service import Hub
from trainchain.core.hub.store import Row, one
from trainchain.core.hub.verdicts import Finding, measured
from trainchain.core.messages import SignedReplay
from trainchain.core.models import ResolvedRecipe
from trainchain.core.replays import distances
from trainchain.core.segments import NO_END, Moments, State, StateDigests, leaf, start_state
from trainchain.core.tolerances import beyond, cold, tolerance
from trainchain.core.verdicts import Decision, Replayed, contradicted, decide

CODES = {Decision.PASSED: "audit.passed", Decision.FAILED: "audit.differs", Decision.UNDECIDED: "audit.undecided"}


class Case(NamedTuple):
    """An audit with what it is about."""

    job: Row
    recipe: ResolvedRecipe
    audit: Row
    contribution: Row
    round: Row


class Weighed(NamedTuple):
    """What the replays say together: `lacking` is that the claimed end has to be seen first."""

    decision: Decision
    finding: Finding
    lacking: bool = False


def case_of(hub: Hub, db: Connection, audit_lease: str) -> Case:
    audit, contribution = one(db, schema.audits, lease=audit_lease), one(db, schema.contributions, lease=audit_lease)
    assert audit is not None
    assert contribution is not None
    job = one(db, schema.jobs, id=audit["job"])
    round_ = one(db, schema.rounds, job=audit["job"], round=audit["round"])
    assert job is not None
    assert round_ is not None
    return Case(job, hub.recipe(job), audit, contribution, round_)


def leaf_at(case: Case, index: int, digests: StateDigests) -> str:
    """The leaf that a state with these digests has in the contribution's tree."""
    lease = bytes.fromhex(case.audit["lease"][2:])
    return "0x" + leaf(lease, index, states.steps_at(case.recipe, index), digests).hex()


def opened(answer: Mapping[str, Any], index: int) -> StateDigests | None:
    """The digests of a state as its worker opened them."""
    for opening in answer["openings"]:
        if opening["index"] == index:
            return StateDigests(*(bytes.fromhex(opening[part][2:]) for part in "wmv"))
    return None


def start_of(hub: Hub, case: Case) -> tuple[Adapter, Moments | None]:
    """What every shard of the round starts from."""
    start = read_adapter(hub.objects.get(case.round["start"]))
    with hub.store.read() as db:
        last = one(db, schema.rounds, job=case.job["id"], round=case.round["round"] - 1)
    way = case.recipe.merge
    if last is None or not way.hands_on:
        return start, None
    step = hub.objects.get(last["outer_step"])
    return start, decode(step, way.encoding, tensor_specs(start), moments=True).moments


def done_replays(db: Connection, audit_lease: str, coming: str | None) -> list[Row]:
    table = schema.replays
    here = (table.c.audit == audit_lease) & table.c.ringer.is_(False)
    rows = db.execute(select(table).where(here, table.c.done.is_not(None)).order_by(table.c.done)).mappings().all()
    last = one(db, table, lease=coming) if coming else None
    return [*(row for row in rows if row["lease"] != coming), *([last] if last is not None else [])]


def so_far(hub: Hub, audit_lease: str) -> Finding:
    """What an audit says whose time is over: what came was not enough, or nothing came."""
    with hub.store.read() as db:
        case, rows = case_of(hub, db, audit_lease), done_replays(db, audit_lease, None)
        seen, own = {row["lease"]: states.named(db, row["lease"]) for row in rows}, states.named(db, audit_lease)
    if not rows:
        return Finding("audit.unaudited")
    return weigh(hub, case, case.audit["answer"], rows, own, seen).finding._replace(code="audit.undecided")


def weigh(
    hub: Hub,
    case: Case,
    answer: Mapping[str, Any],
    rows: Sequence[Row],
    own: Mapping[int, str],
    seen: Mapping[str, Mapping[int, str]],
) -> Weighed:
    """Compare every replay with the claim, and with each other where they stand against it.

    What breaks down, and what the worker withholds its own end from, differs without a comparison.
    """
    index, measure = case.audit["segment"] + 1, Measure(hub, case, own)
    claimed = opened(answer, index)
    assert claimed is not None
    claim, own_class = leaf_at(case, index, claimed), case.contribution["signed"]["contribution"]["numericClass"]
    differ = [row for row in rows if row["end_leaf"] != claim]
    withheld = index not in own and bool(answer.get("withheld"))
    if index not in own and not withheld and any(row["end_leaf"] != NO_END for row in differ):
        return Weighed(Decision.MORE, Finding(""), lacking=True)
    replayed, told = [], []
    for row in rows:
        signed = SignedReplay.model_validate(row["signed"])
        equal, state = row["end_leaf"] == claim, seen[row["lease"]].get(index)
        apart = None if equal or state is None or withheld else measure.apart(own[index], state)
        same_class = signed.replay.numericClass == own_class
        values = {
            "role": row["role"],
            "equal": equal,
            "within": apart[1] if apart is not None else None if equal else False,
        }
        replayed.append(Replayed(auditor=row["auditor"], end=row["end_leaf"], **values))
        distance = None if apart is None else apart[0]
        told.append(
            ReplayEvidence(
                signed=signed, same_class=same_class, state=None if equal else state, distances=distance, **values
            )
        )

    def alike(one_: int, other: int) -> bool:
        if NO_END in (rows[one_]["end_leaf"], rows[other]["end_leaf"]):
            return False
        ends = [seen[rows[at]["lease"]][index] for at in (one_, other)]
        return measure.apart(*ends)[1] and measure.apart(*reversed(ends))[1]

    decision = decide(replayed, alike)
    wrong = [rows[at]["lease"] for at in contradicted(replayed, decision)]
    code = "audit.silent" if withheld and decision == Decision.FAILED else CODES.get(decision, "")
    finding = Finding(
        code,
        cold=measure.cold if differ else None,
        tolerance=measure.tolerance if differ else None,
        replays=told,
        wrong=wrong,
        keep=any(replay.equal for replay in replayed),
    )
    return Weighed(decision, finding)


class Measure:
    """Distances of an audit's ends from each other, and whether they are within the recipe's tolerance."""

    def __init__(self, hub: Hub, case: Case, own: Mapping[int, str]) -> None:
        self._hub, self._case, self._own = hub, case, own
        self._start: State | None = None

    @property
    def start(self) -> State:
        if self._start is None:
            segment = self._case.audit["segment"]
            if segment:
                self._start = states.read(self._hub, self._case.job, segment, self._own[segment])
            else:
                self._start = start_state(*start_of(self._hub, self._case))
        return self._start

    @property
    def cold(self) -> bool:
        case = self._case
        fresh = case.round["round"] == 1 or not case.recipe.merge.hands_on
        return cold(start=states.steps_at(case.recipe, case.audit["segment"]), fresh=fresh)

    @property
    def tolerance(self) -> Measured:
        found = tolerance(self._case.recipe.training, cold=self.cold)
        return Measured(**vars(found), furthest=self._reach())

    def _reach(self) -> float:
        """How far one element may be: as far as the segment's steps can move it."""
        segment, recipe = self._case.audit["segment"], self._case.recipe
        first, last = (states.steps_at(recipe, index) for index in (segment, segment + 1))
        return reach(recipe, self._case.audit["round"], first + 1, last)

    def apart(self, claimed: str, replayed: str) -> tuple[Measured, bool]:
        """The distance of two ends, by their objects, and whether it is within."""
        index, training = self._case.audit["segment"] + 1, self._case.recipe.training
        ends = [states.read(self._hub, self._case.job, index, digest) for digest in (claimed, replayed)]
        found = distances(self.start, *ends, beta1=training.adam_beta1, beta2=training.adam_beta2)
        over = beyond(found, tolerance(training, cold=self.cold))
        return measured(found), not over and found.furthest <= self._reach()
