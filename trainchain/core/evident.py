"""Deciding audits again from their evidence documents: whether each holds what was signed, and its verdict follows.

Where states are objects that can be had, distances are measured again; where not, those in the document are held
against the tolerance. Imports numpy.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from trainchain.core.adapter import Adapter, read_adapter, tensor_specs
from trainchain.core.adapter import delta as delta_of
from trainchain.core.checks import impossible, reach
from trainchain.core.digests import sha256
from trainchain.core.encodings import decode, encode
from trainchain.core.errors import TrainChainError
from trainchain.core.evidence import REJECTS, Evidence, ReplayEvidence
from trainchain.core.history import Accepted, ToldAudit
from trainchain.core.rechecks import EVIDENCE, FORFEITS, Told, kept_back
from trainchain.core.recount import Finding, Recover
from trainchain.core.replays import distances
from trainchain.core.segments import (
    NO_END,
    Moments,
    State,
    StateDigests,
    leaf,
    read_state,
    segment_ends,
    start_leaf,
    start_state,
    state_digests,
    verify,
)
from trainchain.core.tolerances import cold, tolerance
from trainchain.core.verdicts import Decision, Replayed, contradicted, decide

CODES = {
    Decision.PASSED: "audit.passed",
    Decision.FAILED: "audit.differs",
    Decision.UNDECIDED: "audit.undecided",
    Decision.MORE: "audit.undecided",
}
REPLAYED = frozenset(CODES.values())
SOONEST = 1 / 8
"""Of the grace time: no draw has to be answered sooner, however late in a job it falls."""
NEAR = 1e-6

Fetch = Callable[[str], bytes | None]
"""An object by its digest; None where it cannot be had."""


class Judged(NamedTuple):
    """What does not hold, and when which replays, by their leases, were proven wrong."""

    findings: list[Finding]
    wrong: dict[str, float]


def judge(told: Told, documents: Mapping[str, Evidence | None], recover: Recover, fetch: Fetch) -> Judged:
    """Look through the evidence of every verdict. `documents` are by the contribution's lease, None for what cannot be
    had or read."""
    found: list[Finding] = []
    wrong: dict[str, float] = {}
    rows = {row.contribution.lease: row for row in told.rows}
    for audit in told.audits:
        row, document = rows.get(audit.lease), documents.get(audit.lease)
        if audit.code is None or row is None:
            continue
        where = f"The verdict {audit.code} on round {audit.round}, shard {audit.shard}, by {audit.worker},"
        if document is None and kept_back(told, audit):
            continue
        if document is None:
            found.append(Finding(EVIDENCE, f"{where} has no evidence that can be read."))
            continue
        case = _Case(told, audit, row, document, recover, fetch)
        odd = list(case.wrong())
        found += [Finding(EVIDENCE, f"{where} {says}.") for says in odd]
        found += [Finding(FORFEITS, f"{where} {says}.") for says in case.cost()]
        if not odd:
            wrong |= dict.fromkeys(case.contradicted(), document.decided)
    return Judged(found, wrong)


class _Case:
    def __init__(
        self, told: Told, audit: ToldAudit, row: Accepted, document: Evidence, recover: Recover, fetch: Fetch
    ) -> None:
        self._told, self._audit, self._row, self._document = told, audit, row, document
        self._recover, self._fetch = recover, fetch
        self._recipe = told.recipe
        self._lease = bytes.fromhex(audit.lease[2:])
        self._ends: dict[str, State | None] = {}
        self._leaves = {opening.index: self._leaf(opening.index, _digests(opening)) for opening in document.openings}
        self._index = audit.segment + 1

    def wrong(self) -> Iterator[str]:
        yield from self._told_otherwise()
        yield from self._openings()
        yield from self._states()
        code = self._document.code
        if code == "audit.silent" and self._document.replays:  # it withheld the end that they differ from
            yield from self._replays()
        elif code == "audit.silent":
            soonest = min(self._recipe.check.answer, self._recipe.pay.grace * SOONEST)
            if self._document.decided - self._document.drawn < soonest - NEAR:
                yield "rejects a silence before there was time to answer"
        elif code == "audit.wrong_start":
            yield from self._start()
        elif code == "audit.wrong_delta":
            yield from self._delta()
        elif code == "audit.impossible":
            yield from self._impossible()
        elif code == "audit.unaudited":
            if self._document.replays:
                yield "says that nobody replayed it, and holds replays"
        else:
            yield from self._replays()

    def cost(self) -> Iterator[str]:
        """Whether the document says what was forfeited with it."""
        lost, rejects = self._document.forfeits, self._document.code in REJECTS
        if rejects != (lost is not None):
            yield "rejects and forfeits nothing" if rejects else "forfeits, and rejects nothing"
        elif lost is not None:
            mine = [row for row in self._told.rows if row.contribution.worker.lower() == self._audit.worker.lower()]
            taken = [row for row in mine if lost.first <= row.receipt.place <= lost.last]
            amount = sum(row.receipt.amount for row in taken)
            if not lost.first <= self._row.receipt.place <= lost.last or amount != lost.amount:
                yield f"says that the places {lost.first} to {lost.last} are forfeited, worth {lost.amount} units"
            elif any(row.forfeited is None for row in taken) and self._audit in self._told.early:
                yield f"forfeits the places {lost.first} to {lost.last}, and not all of them are told of as forfeited"

    def contradicted(self) -> list[str]:
        replays = self._document.replays
        decision = next((one for one, code in CODES.items() if code == self._document.code), Decision.MORE)
        return [replays[at].signed.replay.lease for at in contradicted(self._replayed(), decision)]

    def _told_otherwise(self) -> Iterator[str]:
        given, audit, row = self._document, self._audit, self._row
        round_ = next((one for one in self._told.before.rounds_done if one.round == audit.round), None)
        pairs = {
            "code": (given.code, audit.code),
            "segment": (given.segment, audit.segment),
            "shards at risk": (given.at_risk, audit.at_risk),
            "place": (given.place, row.receipt.place),
            "worker": (given.worker.lower(), audit.worker.lower()),
            "contribution": (given.contribution, row.contribution),
            "time of the draw": (given.drawn, audit.drawn),
            "time of the verdict": (given.decided, audit.decided),
        }
        if round_ is not None and round_.secret_hash is not None:
            pairs["secret hash"] = (given.secret_hash, round_.secret_hash)
        micro = row.micro_tokens
        if len(micro) > audit.segment:
            pairs["split"] = (given.micro_tokens, micro[audit.segment])
        yield from (
            f"has in its evidence another {name} than is told of" for name, (one, two) in pairs.items() if one != two
        )
        if self._signer("Contribution", given.contribution.model_dump(), given.signature) != audit.worker.lower():
            yield "has in its evidence a contribution that its worker did not sign"

    def _openings(self) -> Iterator[str]:
        root, last = self._document.contribution.stateRoot, self._recipe.segments
        for opening in self._document.openings:
            path = [bytes.fromhex(part[2:]) for part in opening.proof]
            if not verify(root, self._leaves[opening.index], opening.index, last + 1, path):
                yield f"opens a leaf {opening.index} that is not under the signed root"
        if self._document.code != "audit.silent" and self._document.code != "audit.unaudited":
            wanted = {0, self._audit.segment, self._index, last}
            if wanted - self._leaves.keys():
                yield f"does not open all of the leaves {sorted(wanted)}"

    def _states(self) -> Iterator[str]:
        """Whether each state is the one that was opened, or signed; and whether what rejects shows all it rests on."""
        given, names, code = self._document, dict[int, str](), self._document.code
        for name, digest in given.states.items():
            index = int(name)
            names[index] = digest
            state, opened = self._state(index, digest), self._leaves.get(index)
            if state is not None and opened is not None and self._leaf(index, state_digests(state)) != opened:
                yield f"rests on a state {index} that is not the one opened under the signed root"
        for one in given.replays:
            end = self._state(self._index, one.state)
            got = end and "0x" + self._leaf(self._index, state_digests(end)).hex()
            if got is not None and got != one.signed.replay.endLeaf:
                yield f"compares another state than the replay by {one.signed.replay.auditor} signed"
        shown = {"audit.wrong_delta": {self._recipe.segments}, "audit.differs": {self._audit.segment, self._index}}
        wanted = sorted(shown.get(code, set()) - {0})  # everybody can make the start
        lacking = [str(index) for index in wanted if self._state(index, names.get(index)) is None]
        if code == "audit.differs":
            replays = [one for one in given.replays if not one.equal and one.signed.replay.endLeaf != NO_END]
            if not replays:  # nobody can train from there: there is no end to compare with
                lacking = [name for name in lacking if name != str(self._index)]
            auditors = [one.signed.replay.auditor for one in replays if self._state(self._index, one.state) is None]
            lacking += [f"that {auditor} got" for auditor in auditors]
        if lacking:
            yield f"rejects by states that cannot be had: {', '.join(lacking)}"

    def _start(self) -> Iterator[str]:
        found, start = self._leaves.get(0, b""), self._start_of()
        if self._document.found != "0x" + found.hex() or self._document.expected == self._document.found:
            yield "does not show another start than was expected"
        if start is not None:
            due = "0x" + start_leaf(self._lease, *start).hex()
            if due != self._document.expected:
                yield f"expects the start {self._document.expected}; the round's has the leaf {due}"

    def _delta(self) -> Iterator[str]:
        given = self._document.contribution.deltaHash[2:]
        if self._document.found != given or self._document.expected == given:
            yield "does not show another delta than was contributed"
        start, last = self._start_of(), self._recipe.segments
        end = self._state(last, self._document.states.get(str(last)))
        if start is None or end is None:
            return
        moments = Moments(end.m, end.v) if self._recipe.merge.hands_on else None
        try:
            made = sha256(encode(delta_of(end.w, start[0]), self._recipe.merge.encoding, moments))
        except ValueError:
            made = None
        if made != self._document.expected:
            yield f"expects the delta {self._document.expected}; the committed end makes {made}"

    def _impossible(self) -> Iterator[str]:
        start = self._start_of()
        states = [self._state(int(index), digest) for index, digest in self._document.states.items()]
        found = [state for state in states if state is not None]
        if start is not None and not any(impossible(one, start[0], self._recipe, self._audit.round) for one in found):
            yield "shows no state that is impossible"

    def _replays(self) -> Iterator[str]:
        replays, audit = self._document.replays, self._audit
        here = [one.signed.replay.lease for one in replays]
        done = {one.lease for one in audit.replays if one.done is not None and not one.ringer}
        if set(here) != done:
            yield f"rests on {len(here)} replays, and {len(done)} are told of"
        if len({one.signed.replay.auditor.lower() for one in replays}) < len(replays):
            yield "counts one auditor twice"
        for one in replays:
            yield from self._replay(one)
        codes = {CODES[decide(self._replayed(), self._alike(unknown))] for unknown in (True, False)}
        if replays and {"audit.silent": "audit.differs"}.get(self._document.code, self._document.code) not in codes:
            yield f"does not follow from its replays: {' or '.join(sorted(codes))} does"
        if not replays:
            yield "rests on no replay"

    def _replay(self, one: ReplayEvidence) -> Iterator[str]:
        given = one.signed.replay
        who = f"a replay by {given.auditor}"
        if self._signer("Replay", given.model_dump(), one.signed.signature) != given.auditor.lower():
            yield f"rests on {who} that it did not sign"
        if (given.jobId, given.target, given.segment) != (self._told.job, self._audit.lease, self._audit.segment):
            yield f"rests on {who} of something else"
        if given.startLeaf != "0x" + self._leaves.get(self._audit.segment, b"").hex():
            yield f"rests on {who} that started from something else than what was opened"
        if given.auditor.lower() == self._audit.worker.lower():
            yield f"rests on {who}, who contributed it"
        claim = self._leaves.get(self._index, b"")
        same = given.numericClass == self._document.contribution.numericClass
        if one.equal != (given.endLeaf == "0x" + claim.hex()) or one.same_class != same:
            yield f"takes {who} for what it is not"
        roles = [replay.role for replay in self._audit.replays if replay.lease == given.lease]
        if roles and roles != [one.role]:
            yield f"says that {given.auditor} audits as {one.role}; told is {roles[0]}"
        if one.equal or one.distances is None:
            unseen = given.endLeaf == NO_END or self._document.code == "audit.silent"
            if one.within is not (None if one.equal or not unseen else False):
                yield f"compares {who} without measuring it"
            return
        yield from self._measured(one, who)

    def _measured(self, one: ReplayEvidence, who: str) -> Iterator[str]:
        bound, told = self._document.tolerance, one.distances
        assert told is not None
        if bound is None or self._document.cold is None:
            yield f"has no tolerance to hold {who} against"
            return
        due = {**vars(tolerance(self._recipe.training, cold=self._document.cold)), "furthest": self._reach()}
        if any(not _near(getattr(bound, name), value) for name, value in due.items()):
            yield "goes by another tolerance than the recipe's"
        over = [name for name, limit in due.items() if not getattr(told, name) <= limit]
        if one.within != (not over):
            yield f"says that {who} is {'within' if one.within else 'beyond'} the tolerance, and it is not"
        again = self._apart(self._document.states.get(str(self._index)), one.state)
        if again is not None and any(not _near(getattr(told, name), value) for name, value in again.items()):
            yield f"tells other distances of {who} than its states have"
        if self._cold() != self._document.cold:
            yield f"takes its start for {'cold' if self._document.cold else 'warm'}, which it is not"

    def _replayed(self) -> list[Replayed]:
        return [
            Replayed(
                auditor=one.signed.replay.auditor,
                role=one.role,
                end=one.signed.replay.endLeaf,
                equal=one.equal,
                within=one.within,
            )
            for one in self._document.replays
        ]

    def _alike(self, unknown: bool) -> Callable[[int, int], bool]:
        """Whether two replayed ends are within the tolerance of each other; `unknown` where they cannot be had."""
        replays = self._document.replays

        def alike(one: int, other: int) -> bool:
            pair = replays[one].state, replays[other].state
            both = [self._apart(*pair), self._apart(*reversed(pair))]
            if None in both:
                return unknown
            limits = {**vars(tolerance(self._recipe.training, cold=self._cold())), "furthest": self._reach()}
            return all(apart is not None and _within(apart, limits) for apart in both)

        return alike

    def _apart(self, claimed: str | None, replayed: str | None) -> dict[str, float] | None:
        start, ends = self._begin(), [self._state(self._index, digest) for digest in (claimed, replayed)]
        if start is None or ends[0] is None or ends[1] is None:
            return None
        training = self._recipe.training
        found = distances(start, ends[0], ends[1], beta1=training.adam_beta1, beta2=training.adam_beta2)
        return vars(found)

    def _cold(self) -> bool:
        fresh = self._audit.round == 1 or not self._recipe.merge.hands_on
        return cold(start=self._t(self._audit.segment), fresh=fresh)

    def _begin(self) -> State | None:
        """What the segment starts from."""
        if self._audit.segment:
            return self._state(self._audit.segment, self._document.states.get(str(self._audit.segment)))
        start = self._start_of()
        return None if start is None else start_state(*start)

    def _start_of(self) -> tuple[Adapter, Moments | None] | None:
        """What every shard of the round starts from."""
        rounds = {round_.round: round_ for round_ in self._told.before.rounds_done}
        data = self._fetch(rounds[self._audit.round].start) if self._audit.round in rounds else None
        if data is None:
            return None
        start, way = read_adapter(data), self._recipe.merge
        last = rounds.get(self._audit.round - 1)
        if last is None or not way.hands_on:
            return start, None
        step = self._fetch(last.outer_step) if last.outer_step else None
        return None if step is None else (start, decode(step, way.encoding, tensor_specs(start), moments=True).moments)

    def _state(self, index: int, digest: str | None) -> State | None:
        if digest is None or index > self._recipe.segments:
            return None
        if digest not in self._ends:
            data, initial = self._fetch(digest), self._fetch(self._recipe.lora.initial.sha256)
            try:
                shapes = {} if initial is None else {name: one.shape for name, one in read_adapter(initial).items()}
                self._ends[digest] = read_state(data, self._t(index), shapes) if data is not None and shapes else None
            except TrainChainError:
                self._ends[digest] = None
        return self._ends[digest]

    def _t(self, index: int) -> int:
        return 0 if index == 0 else segment_ends(self._recipe.steps, self._recipe.training.segment_steps)[index - 1]

    def _leaf(self, index: int, digests: StateDigests) -> bytes:
        return leaf(self._lease, index, self._t(index), digests) if index <= self._recipe.segments else b""

    def _reach(self) -> float:
        return reach(self._recipe, self._audit.round, self._t(self._index - 1) + 1, self._t(self._index))

    def _signer(self, kind: str, fields: Mapping[str, object], signature: str) -> str:
        try:
            return self._recover(self._told.chain, kind, dict(fields), signature).lower()
        except TrainChainError:
            return ""


def _digests(opening: object) -> StateDigests:
    return StateDigests(*(bytes.fromhex(getattr(opening, part)[2:]) for part in "wmv"))


def _within(found: Mapping[str, float], limits: Mapping[str, float]) -> bool:
    return all(math.isfinite(found[name]) and found[name] <= limit for name, limit in limits.items())


def _near(told: float | None, found: float) -> bool:
    """A sum has other last bits elsewhere, and a document no word for infinity."""
    if told is None or not math.isfinite(found):
        return told is not None and told > 1e300
    return math.isclose(told, found, rel_tol=NEAR, abs_tol=1e-12)
