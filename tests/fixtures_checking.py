"""Workers and auditors of a toy training in numpy: what they commit to, open and replay is real, the model is not."""

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

from tests.fixtures_hub import LEARNING_RATE, SHAPES, STEPS, Job, Person, Town
from tests.fixtures_merge import UNCHECKED
from trainchain.chain.eip712 import Domain
from trainchain.core.adapter import delta, read_adapter
from trainchain.core.draws import draw
from trainchain.core.encodings import decode, encode
from trainchain.core.hub import schema
from trainchain.core.hub.auditors import STEP
from trainchain.core.rewards import at_risk
from trainchain.core.segments import (
    Moments,
    State,
    StateDigests,
    bf16,
    from_bf16,
    leaf,
    proof,
    read_state,
    segment_ends,
    start_state,
    state_bytes,
    state_digests,
    state_root,
)

CHECKED = UNCHECKED.model_copy(update={"auditors": "any", "spend": 0.5})
LONG = {"round_deadline": 10**6, "pay_deadline": 10**7}
"""For jobs in which a test lets much time go by."""
OWN = UNCHECKED.model_copy(update={"auditors": "owner"})
ENDS = segment_ends(STEPS, 1)
Cheat = Callable[[int, State], State]
"""What a worker makes of the state at an index, after it was trained to."""


def train_one(state: State, index: int, data: int) -> State:
    """The segment from state `index` on. It depends on every number of the state, as training does."""
    random = np.random.default_rng([data, index])
    w, m, v = {}, {}, {}
    for name in sorted(SHAPES):
        gradient = random.normal(0, 0.05, SHAPES[name]) + 0.01 * np.sin(state.w[name])
        step = LEARNING_RATE * np.tanh(10 * gradient + state.m[name])
        w[name] = (state.w[name] - step).astype(np.float32)
        m[name] = from_bf16(bf16((0.9 * state.m[name] + 0.1 * gradient).astype(np.float32)))
        v[name] = from_bf16(bf16((0.999 * state.v[name] + 0.001 * gradient**2).astype(np.float32)))
    return State(ENDS[index], w, m, v)


def nudged(state: State, by: float) -> State:
    """What another machine gets: every number off by a share of itself."""
    return State(
        state.t,
        {name: (tensor * np.float32(1 + by)).astype(np.float32) for name, tensor in state.w.items()},
        state.m,
        state.v,
    )


def moved(state: State, by: float) -> State:
    """What no training gets: every weight further by as much."""
    return State(state.t, {name: tensor + np.float32(by) for name, tensor in state.w.items()}, state.m, state.v)


def cheat_at(index: int, by: float = LEARNING_RATE) -> Cheat:
    """Forge the segment that ends at `index`; what follows is trained from there."""
    return lambda at, state: moved(state, by) if at == index else state


@dataclass
class Work:
    """A shard as its worker did it."""

    who: Person
    lease: dict[str, Any]
    states: list[State]
    data: bytes
    draw: dict[str, Any] | None = None
    receipt: dict[str, Any] = field(default_factory=dict)

    @property
    def digests(self) -> list[StateDigests]:
        return [state_digests(state) for state in self.states]

    @property
    def leaves(self) -> list[bytes]:
        lease = bytes.fromhex(self.lease["lease"][2:])
        return [
            leaf(lease, index, state.t, found)
            for index, (state, found) in enumerate(zip(self.states, self.digests, strict=True))
        ]

    @property
    def root(self) -> str:
        """The root that was signed with it."""
        return state_root(self.leaves)

    @property
    def id(self) -> str:
        return str(self.lease["lease"])

    @property
    def segment(self) -> int:
        assert self.draw is not None, "no draw fell on it"
        return int(self.draw["segment"])

    def opening(self, index: int) -> dict[str, Any]:
        parts = self.digests[index]
        return {
            "index": index,
            **{name: "0x" + part.hex() for name, part in zip("wmv", parts, strict=True)},
            "proof": ["0x" + node.hex() for node in proof(self.leaves, index)],
        }

    def openings(self) -> dict[str, Any]:
        wanted = sorted({0, self.segment, self.segment + 1, len(self.states) - 1})
        return {"openings": [self.opening(index) for index in wanted]}


class Yard:
    """Everybody's work in one town: what each lease was trained on is known here, as data is known to all."""

    def __init__(self, town: Town) -> None:
        self.town = town
        self.data: dict[str, int] = {}
        self.begun: dict[str, State] = {}
        self.ringers(False)

    def ringers(self, given: bool) -> None:
        """Have the hub's dice always give one where there is one, or never."""
        self.town.hub.random_hex = lambda size: ("0000" if given else "ffff") if size == 2 else secrets.token_hex(size)

    @property
    def operator(self) -> Person:
        return self.town.person(self.town.evaluator_keys)

    def start(self, who: Person, lease: Mapping[str, Any], job: Job) -> State:
        way, start = job.recipe.merge, read_adapter(who.fetch(lease["start"]))
        if not way.hands_on or not lease.get("outer_step"):
            return start_state(start)
        step = who.fetch(lease["outer_step"])
        return start_state(start, decode(step, way.encoding, SHAPES, moments=True).moments)

    def train(self, who: Person, job: Job, lease: dict[str, Any], data: int, cheat: Cheat | None = None) -> Work:
        states = [self.start(who, lease, job)]
        first = states[0]
        for index in range(len(ENDS)):
            found = train_one(states[-1], index, data)
            states.append(cheat(index + 1, found) if cheat else found)
        way = job.recipe.merge
        moments = Moments(states[-1].m, states[-1].v) if way.hands_on else None
        bytes_ = encode(delta(states[-1].w, dict(first.w)), way.encoding, moments)
        if cheat:
            states[0] = cheat(0, first)
        return Work(who, lease, states, bytes_)

    def foresee(self, work: Work, job: Job) -> int | None:
        """What only a test can: the draw that would fall on this work."""
        secret = self.town.row(schema.rounds, job=job.id, round=work.lease["round"])["secret"]
        rows = [row for row in self.town.rows(schema.contributions, job=job.id) if row["worker"] == work.who.address]
        place = max((row["place"] for row in rows), default=0) + 1
        lost = max((row["place"] for row in rows if row["forfeited"] is not None), default=0)
        given = (bytes.fromhex(text[2:]) for text in (secret, work.id, state_root(work.leaves)))
        return draw(*given, at_risk=at_risk(place, lost), steps=STEPS, segment_steps=1)  # type: ignore[misc]

    def work(
        self,
        who: Person,
        job: Job,
        *,
        drawn: bool | None = None,
        segment: int | None = None,
        cheat: Cheat | None = None,
        lease: dict[str, Any] | None = None,
        delta: bytes | None = None,
        **changes: Any,
    ) -> Work:
        """Train a shard and hand it in; on data by which it is drawn, or is not, or for that very segment."""
        lease = lease or who.must_lease(job)
        for _ in range(500):
            data = secrets.randbits(40)
            work = self.train(who, job, lease, data, cheat)
            found = self.foresee(work, job) if job.recipe.audited else None
            if segment is not None and found != segment:
                continue
            if drawn is None or drawn == (found is not None):
                break
        else:
            raise AssertionError("no draw like that comes")
        self.data[work.id] = data
        work.data = delta or work.data
        root = {"stateRoot": state_root(work.leaves), "encoding": job.recipe.merge.encoding}
        answer = who.contribute(lease, work.data, **{**root, **changes})
        assert answer.status_code == 200, answer.text
        work.receipt = answer.json()
        work.draw = work.receipt.pop("draw")
        assert (work.draw or {}).get("segment") == found, "the draw is not the one that follows from the secret"
        self.town.tick()
        return work

    def put(self, work: Work, index: int, state: State | bytes | None = None) -> httpx.Response:
        data = state if isinstance(state, bytes) else state_bytes(state or work.states[index])
        return work.who.put(f"/v1/leases/{work.id}/states/{index}", data)

    def post(self, work: Work, document: Any = None) -> httpx.Response:
        return work.who.post(f"/v1/leases/{work.id}/answer", document or work.openings())

    def answer(self, work: Work) -> dict[str, Any]:
        """Hand in all that is asked for by now."""
        for index in self.row(work)["wants"]:
            self.put(work, index).raise_for_status()
        found: dict[str, Any] = self.post(work).raise_for_status().json()
        self.town.tick()
        return found

    def row(self, work: Work) -> dict[str, Any]:
        return self.town.row(schema.audits, lease=work.id)

    def given(self, work: Work) -> dict[str, Any]:
        return self.town.row(schema.contributions, lease=work.id)

    def verdict(self, work: Work) -> tuple[str, str | None]:
        row = self.row(work)
        return row["state"], row["code"]

    def evidence(self, work: Work) -> dict[str, Any]:
        """As its worker is shown it."""
        path = f"/v1/jobs/{work.lease['job']}/evidence/{work.id}"
        found: dict[str, Any] = work.who.get(path).raise_for_status().json()
        return found

    def take(self, auditor: Person, job: Job) -> dict[str, Any] | None:
        answer = auditor.post("/v1/leases", {"job": job.id, "only": "replay"}).raise_for_status()
        return None if answer.status_code == 204 else answer.json()

    def must_take(self, auditor: Person, job: Job) -> dict[str, Any]:
        """Wait in the line of auditors until it is this one's turn."""
        for _ in range(10):
            if (found := self.take(auditor, job)) is not None:
                break
            self.town.clock.forward(STEP)
        assert found is not None, "there is nothing to replay"
        assert found["kind"] == "replay"
        return found

    def replayed(self, auditor: Person, job: Job, offer: Mapping[str, Any]) -> State:
        """The end of the segment as an honest auditor gets it, from nothing but what it may read."""
        segment = offer["segment"]
        if offer["state"] is None:
            start = self.start(auditor, offer, job)
        else:
            start = read_state(auditor.fetch(offer["state"]), ENDS[segment - 1], SHAPES)
        self.begun[offer["lease"]] = start
        return train_one(start, segment, self.data[offer["target"]])

    def signed(self, auditor: Person, offer: Mapping[str, Any], end: State, /, **changes: Any) -> dict[str, Any]:
        segment, target = offer["segment"], bytes.fromhex(offer["target"][2:])
        start = self.begun[offer["lease"]]
        message = {
            "jobId": offer["job"],
            "lease": offer["lease"],
            "target": offer["target"],
            "segment": segment,
            "auditor": auditor.address,
            "startLeaf": "0x" + leaf(target, segment, start.t, state_digests(start)).hex(),
            "endLeaf": "0x" + leaf(target, segment + 1, end.t, state_digests(end)).hex(),
            "numericClass": "test",
            **changes,
        }
        domain = Domain(self.town.chain.chain_id, self.town.chain.escrow)
        return {"replay": message, "signature": auditor.wallet.sign_typed(domain, "Replay", message)}

    def send(self, auditor: Person, offer: Mapping[str, Any], end: State, /, **changes: Any) -> dict[str, Any]:
        """Sign what was got, and hand over the state where the hub wants it."""
        document, path = self.signed(auditor, offer, end, **changes), f"/v1/leases/{offer['lease']}"
        answer = auditor.post(f"{path}/replay", document).raise_for_status().json()
        if answer["wants_state"]:
            auditor.put(f"{path}/states/{offer['segment'] + 1}", state_bytes(end)).raise_for_status()
            answer = auditor.post(f"{path}/replay", document).raise_for_status().json()
        self.town.tick()
        found: dict[str, Any] = answer
        return found

    def audit(
        self, auditor: Person, job: Job, change: Callable[[State], State] = lambda state: state, **changes: Any
    ) -> dict[str, Any]:
        """Take the next replay and hand it in, honestly unless it is changed."""
        offer = self.must_take(auditor, job)
        assert self.send(auditor, offer, change(self.replayed(auditor, job, offer)), **changes)["done"]
        return offer

    def passed(self, who: Person, job: Job, **options: Any) -> Work:
        """Work that is drawn, answered, and replayed by the operator."""
        work = self.work(who, job, drawn=True, **options)
        self.answer(work)
        self.audit(self.operator, job)
        assert self.verdict(work) == ("passed", "audit.passed")
        return work

    def veteran(self, job: Job, shards: int = 19) -> Person:
        """A wallet with so many accepted shards in the job, that it may audit there."""
        who = self.town.person()
        self.passed(who, job)
        for _ in range(shards - 1):
            self.work(who, job, drawn=False)
        return who
