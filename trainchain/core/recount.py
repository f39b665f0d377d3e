"""Recomputing what a job pays, from what is public: contributions and receipts, the rewards that follow from them, the
leaves that follow from the rewards, roots and totals, and what the chain has paid.

Pure functions. Each tells all that does not hold, as findings, so that whoever recounts sees more than the first.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from trainchain.core.balance import Balance, Settled
from trainchain.core.errors import TrainChainError
from trainchain.core.history import Accepted, Chain, History, Receipt, ToldSettlement
from trainchain.core.models import ResolvedRecipe
from trainchain.core.money import show
from trainchain.core.rewards import LATEST, NEVER, Earned, Terms, recount, shard_reward, totals, vested

REWARDS, LEAVES, ROOT, CHAIN = "verify.rewards", "verify.leaves", "verify.root", "verify.chain"

Recover = Callable[[Chain, str, Mapping[str, Any], str], str]
"""Who signed the fields of a type for a chain's escrow, checksummed. Raises TrainChainError where nobody did."""


class Finding(NamedTuple):
    """Something that does not hold: what is there, and what should be."""

    code: str
    says: str

    def error(self) -> TrainChainError:
        return TrainChainError(self.code, self.says)


class Leaves(NamedTuple):
    """What a leaves file says, and what its leaves hash and add up to."""

    job: str
    terms: Terms
    root: str
    total: int
    amounts: Mapping[str, int]
    """By checksummed address, as everywhere here."""


class OnChain(NamedTuple):
    """What stands on chain of a settlement."""

    number: int
    root: str
    total: int


class Sums(NamedTuple):
    """What the escrow itself says of a job's money. None of it ever falls."""

    funded: int
    refunded: int
    total: int
    claimed: int


class Line(NamedTuple):
    """One account's money in a job, of shards and of replays; `accepted` is what stands of it, `settled` as the last
    settlement says, `paid` by leaf or voucher."""

    account: str
    shards: int
    accepted: int
    vested: int
    settled: int
    paid: int
    forfeited: int = 0


def earned(
    recipe: ResolvedRecipe,
    job: str,
    chain: Chain,
    rows: Iterable[Accepted],
    recover: Recover,
    *,
    hubs: Collection[str] = (),
) -> tuple[list[Earned], list[Finding]]:
    """What the contributions earned by the recipe's prices, and what does not hold of them, of their receipts and of
    the places in each worker's queue. `hubs`: who else than `chain.hub` was the job's hub, in lower case."""
    found: list[Finding] = []
    taken: dict[tuple[int, int], Earned] = {}
    for row in rows:
        given, where = row.contribution, f"round {row.which[0]}, shard {row.which[1]}"
        if given.jobId != job or given.round > recipe.rounds or given.shard >= recipe.all_shards:
            found.append(Finding(REWARDS, f"The contribution of {where} is not of this job."))
        elif row.which in taken:
            found.append(Finding(REWARDS, f"The contribution of {where} is told of twice."))
        else:
            signer = _signer(recover, chain, "Contribution", given.model_dump(), row.signature)
            signed = signer.lower() == given.worker.lower()
            worker, reward = signer if signed else given.worker, shard_reward(recipe, given.round, given.shard)
            wrong = [] if signed else [("contribution", f"is signed by {signer}")]
            wrong += _wrong(row, recipe, reward, chain, {chain.hub.lower(), *hubs}, recover)
            found += [Finding(REWARDS, f"The {what} of {where}, by {worker}, {says}.") for what, says in wrong]
            stamps = [NEVER if stamp is None else stamp for stamp in (row.resolved, row.forfeited)]
            place, counted = row.receipt.place, row.counted
            taken[row.which] = Earned(*row.which, worker, place, reward, counted, "shard", *stamps)
    return sorted(taken.values()), found + queues(taken.values(), "accepted shards")


def verdicts(before: History, rows: Iterable[Accepted], after: History) -> list[Finding]:
    """Whether the contributions told of are those that the hub's own view of the job has as accepted. `before` and
    `after` are views from before and after the contributions were asked for: the job may have gone on."""
    told = {row.which: (row.contribution.worker, row.counted) for row in rows}
    least, most = _accepted(before), _accepted(after)
    found = []
    for which in sorted(set(least) | set(told)):
        where = f"round {which[0]}, shard {which[1]}"
        if which not in told:
            found.append(f"{where} is accepted of {least[which][0]}, and its contribution is not told of.")
        elif which not in most:
            found.append(f"The contribution of {where} by {told[which][0]} is told of, and the shard is not accepted.")
        elif [str(fact).lower() for fact in told[which]] != [str(fact).lower() for fact in most[which]]:
            (here, counts), (there, would) = told[which], most[which]
            found.append(f"{where} is by {here} and counts with round {counts}; as accepted, {there} and {would}.")
    return [Finding(REWARDS, says[0].upper() + says[1:]) for says in found]


def promised(
    rows: Iterable[Accepted], receipts: Iterable[Receipt], chain: Chain, recover: Recover, *, hubs: Collection[str] = ()
) -> list[Finding]:
    """Whether every receipt that was kept, and that a hub of the job did sign, is among those told of."""
    told = {tuple(row.receipt.fields().values()) for row in rows}
    signers = {chain.hub.lower(), *hubs}
    return [
        Finding(
            REWARDS,
            f"{kept.worker} holds a signed receipt of {show(kept.amount)} for round {kept.round}, shard {kept.shard}, "
            f"place {kept.place}, and no such contribution is told of.",
        )
        for kept in receipts
        if tuple(kept.fields().values()) not in told
        and _signer(recover, chain, "Receipt", kept.fields(), kept.signature).lower() in signers
    ]


def rules(files: Iterable[Leaves], *, cap: int, merged: int, over: bool) -> list[Finding]:
    """Whether each settlement went by a rule that was its to go by: at most the escrow's cap, only merged rounds until
    the job has ended (`over`), and from there on no way back."""
    found, ended = [], 0
    for number, as_ended, limit in sorted(file.terms for file in files):
        if limit > cap:
            found.append(
                f"Settlement {number} allowed itself to add {show(limit)}; the escrow's round cap is {show(cap)}."
            )
        if as_ended and not over:
            found.append(f"Settlement {number} pays as if the job had ended, and it goes on.")
        if not as_ended and ended:
            found.append(f"Settlement {number} pays as if the job went on; by settlement {ended} it had ended.")
        if not as_ended and number > merged:
            found.append(f"Settlement {number} says that round {number} is merged; the last that is, is {merged}.")
        ended = ended or (number if as_ended else 0)
    return [Finding(LEAVES, says) for says in found]


def leaves(
    job: str, rows: Sequence[Earned], files: Mapping[int, Leaves | None], *, known: int | None = None
) -> list[Finding]:
    """Whether every settlement, by its number, owes every account exactly what had vested of what it earned.

    A file that cannot be read is None: what follows it can only be held to bounds, since what it had settled is not
    known. So can settlements that count more than `rows` do, which hold what counts through round `known` (None: all).
    """
    found: list[Finding] = []
    exact: list[Terms] = []
    for number in sorted(files):
        file = files[number]
        if file is None or not (known is None or number <= known or (exact and exact[-1].ended)):
            break
        exact.append(file.terms)
    due: Mapping[str, int] = {}
    before: Leaves | None = None
    duties = recount(rows, exact)
    for place, number in enumerate(sorted(files)):
        file = files[number]
        if file is None:
            continue
        if (file.job, file.terms.number) != (job, number):
            says = f"is settlement {file.terms.number} of job {file.job}"
            found.append(Finding(LEAVES, f"The leaves file of settlement {number} {says}."))
        if place < len(exact):
            due = duties[place]
            found += _unequal(number, file.amounts, due)
        else:
            most = totals(vested(rows, file.terms)) if known is None else None
            least = dict(due)
            for account, amount in (before.amounts if before else {}).items():
                least[account] = max(amount, least.get(account, 0))
            found += _outside(number, file.amounts, least, most)
        before = file
    return found


def roots(settled: Iterable[OnChain], files: Mapping[int, Leaves | None], *, cap: int | None = None) -> list[Finding]:
    """Whether each root and total is that of its leaves, and no total fell or rose by more than the round cap."""
    found, last = [], 0
    for number, root, total in sorted(settled):
        if total < last:
            found.append(f"Settlement {number} lowers the total from {show(last)} to {show(total)}.")
        if cap is not None and total - last > cap:
            found.append(f"Settlement {number} raises the total by {show(total - last)}; the round cap is {show(cap)}.")
        file = files.get(number)
        if file is not None and file.root != root:
            found.append(f"Settlement {number} has the root {root}; its leaves have {file.root}.")
        if file is not None and file.total != total:
            odd = f"{show(abs(total - file.total))} {'belong to nobody' if total > file.total else 'are not covered'}"
            found.append(
                f"Settlement {number} has the total {show(total)}; its leaves add up to {show(file.total)}: {odd}."
            )
        last = total
    return [Finding(ROOT, says) for says in found]


def listed(told: Iterable[ToldSettlement], settled: Iterable[Settled]) -> list[Finding]:
    """Whether the settlements that a hub tells of stand on chain as it tells them. One that is newer than what was read
    of the chain is passed over."""
    chain = {one.number: (one.root, one.total, one.data_hash.removeprefix("0x")) for one in settled}
    found = []
    for row in told:
        if row.round <= max(chain, default=0) and chain.get(row.round) != (row.root, row.total, row.leaves):
            there = "another one" if row.round in chain else "none"
            says = f"The hub tells of settlement {row.round} with the root {row.root} and the total {show(row.total)}"
            found.append(Finding(ROOT, f"{says}; on chain there is {there} of that number."))
    return found


def table(rows: Sequence[Earned], last: Leaves | None, paid: Mapping[str, int], *, over: bool) -> list[Line]:
    """Every account that earned, is owed or was paid something, in the order of addresses."""
    ripe = totals(vested(rows, Terms(LATEST, over, 0)))
    whole, lost = (totals(row for row in rows if (row.forfeited == NEVER) == stands) for stands in (True, False))
    shards = Counter(row.worker for row in rows if row.kind == "shard")
    owed = last.amounts if last else {}
    return [
        Line(
            account,
            shards[account],
            whole.get(account, 0),
            ripe.get(account, 0),
            owed.get(account, 0),
            paid.get(account, 0),
            lost.get(account, 0),
        )
        for account in sorted({*whole, *lost, *owed, *paid})
    ]


def money(lines: Iterable[Line], balance: Balance, state: Sums) -> list[Finding]:
    """Whether nobody was paid more than had vested for it, the escrow's sums hold, and the log, which is read after its
    `state`, has all of it."""
    found = [
        f"{line.account} was paid {show(line.paid)}; {show(line.vested)} had vested of what it earned."
        for line in lines
        if line.paid > line.vested
    ]
    if not balance.claimed <= balance.settled <= balance.funded - balance.refunded:
        sums = [show(part) for part in (balance.claimed, balance.settled, balance.funded, balance.refunded)]
        found.append("The escrow has paid {} of {} settled, of {} funded less {} given back.".format(*sums))
    for name, held in state._asdict().items():
        if getattr(balance, name) < held:
            says = f"{show(held)} {name}; its log adds up to {show(getattr(balance, name))}"
            found.append(f"The escrow says {says}: a part of the log is kept back.")
    return [Finding(CHAIN, says) for says in found]


def _wrong(
    row: Accepted, recipe: ResolvedRecipe, reward: int, chain: Chain, hubs: Collection[str], recover: Recover
) -> Iterator[tuple[str, str]]:
    given, receipt = row.contribution, row.receipt
    last = min(recipe.rounds, given.round + 1)
    if not given.round <= row.counted <= last or (row.merged_in is None and given.round != recipe.rounds):
        yield "contribution", f"counts with round {row.merged_in}, which takes nothing of round {given.round} in"
    same = ("jobId", "round", "shard", "lease", "deltaHash")
    if any(getattr(given, name) != getattr(receipt, name) for name in same) or (
        receipt.worker.lower() != given.worker.lower()
    ):
        yield "receipt", "is of another contribution"
    if (receipt.chain_id, receipt.escrow.lower()) != (chain.chain_id, chain.escrow.lower()):
        yield "receipt", f"is bound to another escrow, {receipt.escrow} on chain {receipt.chain_id}"
    signer = _signer(recover, chain, "Receipt", receipt.fields(), receipt.signature)
    if signer.lower() not in hubs:
        yield "receipt", f"is signed by {signer}, not by the job's hub {chain.hub}"
    if receipt.amount != reward:
        yield "receipt", f"promises {show(receipt.amount)}; the recipe gives {show(reward)}"


def _signer(recover: Recover, chain: Chain, kind: str, fields: Mapping[str, Any], signature: str) -> str:
    try:
        return recover(chain, kind, fields, signature)
    except TrainChainError:
        return "nobody"


def queues(rows: Iterable[Earned], what: str) -> list[Finding]:
    """Every worker's places must be 1 to n, each once, and what has a later place may count no earlier."""
    queues: dict[str, list[Earned]] = {}
    for row in rows:
        queues.setdefault(row.worker, []).append(row)
    found = []
    for worker, queue in sorted(queues.items()):
        queue.sort(key=lambda row: row.place)
        places = [row.place for row in queue]
        lacking = sorted(set(range(1, len(queue) + 1)) - set(places))
        if lacking:
            shown = ", ".join(map(str, places[:20])) + (", .." if len(places) > 20 else "")
            found.append(
                f"{worker} has {len(queue)} {what} at the places {shown}: none is at place {lacking[0]}, so "
                "one is told of twice or not at all."
            )
        elif any(one.counted > other.counted for one, other in pairwise(queue)):
            found.append(f"{worker} has {what} at places that are not in the order in which they were accepted.")
    return [Finding(REWARDS, says) for says in found]


def _accepted(history: History) -> dict[tuple[int, int], tuple[str, int]]:
    return {
        (row.round, shard.shard): (str(shard.worker), shard.merged_in or row.round)
        for row in history.rounds_done
        for shard in row.accepted()
    }


def _unequal(number: int, here: Mapping[str, int], due: Mapping[str, int]) -> Iterator[Finding]:
    for account in sorted(set(here) | set(due)):
        owed, should = here.get(account, 0), due.get(account, 0)
        if owed != should:
            what = f"owes {account} {show(owed)}" if account in here else f"leaves out {account}"
            yield Finding(LEAVES, f"Settlement {number} {what}; by what had vested for it, it is owed {show(should)}.")


def _outside(
    number: int, here: Mapping[str, int], least: Mapping[str, int], most: Mapping[str, int] | None
) -> Iterator[Finding]:
    for account in sorted(set(here) | set(least)):
        owed, low = here.get(account, 0), least.get(account, 0)
        if owed < low:
            yield Finding(LEAVES, f"Settlement {number} owes {account} {show(owed)}; it was owed {show(low)} before.")
        elif most is not None and owed > most.get(account, 0):
            high = most.get(account, 0)
            yield Finding(LEAVES, f"Settlement {number} owes {account} {show(owed)}; {show(high)} had vested for it.")
