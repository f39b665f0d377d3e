"""What cheating pays: strategies of dishonest workers and auditors, played over the hub's real decision code.

A job of 200 shards is worked off; who cheats takes a part of them. Draws, what is at risk, verdicts, forfeits and what
vests are the functions that the hub calls; only training, replays and the clock are left out: a replay of a forged
segment differs from the claim (tests/attacks shows it), one of an honest segment does not. Pay and cost are in shards'
pay: a shard costs its honest worker `c` of it to train, and whoever forges a share `f` of its segments saves f c.

A gain is the cheat's, per shard, above what honest work on the same shards would have left it. Prints one JSON document
on stdout. Exits 0 whatever it finds.
"""

import argparse
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from statistics import fmean, stdev
from typing import Any, NamedTuple

import report
from launch import begin, log

from trainchain.core.draws import MANY, SECRET_BYTES, draw, probability
from trainchain.core.entries import CheckEntry
from trainchain.core.rewards import NEVER, VESTING, Earned, Terms, at_risk, forfeits, vested
from trainchain.core.verdicts import Decision, Replayed, Role, decide

PACKAGES = ("trainchain",)
SEGMENTS = 8
PAY = 10**6
JOB = 200
"""Shards of the job."""
SHARES = (Fraction(1, 8), Fraction(1, 4), Fraction(1, 2), Fraction(3, 4), Fraction(1))
COSTS = (0.3, 0.7, 1.0)
WITHIN = (1, 5, 10, 20)
RINGERS, STEP, TIMEOUT = 0.06, 20.0, 1800.0
"""As core/hub/auditors.py has them: how many replays are known before, the seconds in which the asked part of the
line doubles; and `check.timeout`."""
LEAST_TRUSTED = 0.5


def trusted(others: int) -> float:
    """How often owner or operator come before so many others who have earned to audit: core/draws.trusted_first."""
    return max(LEAST_TRUSTED, 1 - others / MANY)


EVER = Terms(NEVER - 1, True, 10**18)


class Jury(NamedTuple):
    """Who replays: shares of the auditors that a strategy has to do with, and of the audits that nobody takes."""

    friends: float = 0.0
    """Of those who have earned it: say yes to the cheat's work, whatever it is."""
    liars: float = 0.0
    """Say no to everybody's work, all with the same made-up end."""
    absent: float = 0.0
    trusted: float = LEAST_TRUSTED
    """How often the operator comes first; else it comes second."""
    others: bool = True
    """Whether a worker who is no friend is there to confirm what the operator got."""

    def decide(self, forged: bool, chance: random.Random) -> tuple[bool, int]:
        """Whether the work is rejected, and after how many replays."""
        if chance.random() < self.absent:
            return False, 0
        operator = 0 if chance.random() < self.trusted else 1
        replays: list[Replayed] = []
        while True:
            role: Role = "earned"
            if len(replays) == operator:
                role = "operator"
            elif len(replays) > operator and not replays[operator].equal and len(replays) > 1:
                role = "confirms"
            kind = chance.random() if role == "earned" else 1.0
            says = "claim" if kind < self.friends else "lie" if kind < self.friends + self.liars else "truth"
            equal = says == "claim" or (says == "truth" and not forged)
            if role == "confirms" and not self.others:
                return False, len(replays)
            replays.append(Replayed(str(len(replays)), role, "claim" if equal else says, equal, equal))
            found = decide(replays, lambda i, j: replays[i].end == replays[j].end)
            if found != Decision.MORE:
                return found == Decision.FAILED, len(replays)


HONEST = Jury()


@dataclass
class Wallet:
    """One worker's queue in the job, and the verdicts that it waits for: (shard of the job, place, rejected)."""

    rows: list[Earned] = field(default_factory=list)
    waits: list[tuple[int, int, bool]] = field(default_factory=list)
    lost: int = 0
    caught: int = 0

    def hand_in(self, shard: int, forged: int, chance: random.Random, jury: Jury, delay: int) -> int:
        """A shard whose last `forged` segments are; the number of replays that it takes."""
        place = len(self.rows) + 1
        secret, lease, root = (chance.randbytes(size) for size in (SECRET_BYTES, 32, 32))
        segment = draw(secret, lease, root, at_risk=at_risk(place, self.lost), steps=SEGMENTS, segment_steps=1)
        resolved, replays = 0, 0
        if segment is not None:
            rejected, replays = jury.decide(segment >= SEGMENTS - forged, chance)
            self.waits.append((shard + delay, place, rejected))
            resolved = NEVER
        self.rows.append(Earned(shard + 1, 0, "wallet", place, PAY, shard + 1, resolved=resolved))
        return replays

    def hear(self, shard: int) -> None:
        """The verdicts that are due."""
        for due in [wait for wait in self.waits if wait[0] <= shard]:
            if due not in self.waits:
                continue
            self.waits.remove(due)
            _, place, rejected = due
            if not rejected:
                self.rows[place - 1] = self.rows[place - 1]._replace(resolved=shard + 1)
                continue
            gone = {row.place for row in forfeits(self.rows)}
            self.rows = [row._replace(forfeited=shard + 1) if row.place in gone else row for row in self.rows]
            self.waits = [wait for wait in self.waits if wait[1] not in gone]
            self.lost, self.caught = max(gone), self.caught + 1

    @property
    def paid(self) -> float:
        return sum(row.amount for row in vested(self.rows, EVER)) / PAY


class Now(NamedTuple):
    """What a strategy goes by: which of its shards this is, of how many, and how many its wallet had before."""

    shard: int
    shards: int
    place: int


@dataclass(frozen=True)
class Strategy:
    says: str
    forges: Callable[[Now], bool] = lambda now: True
    fresh: str = "never"
    """When it goes on with a new wallet: never, after each catch, for each shard."""
    delay: int = 0
    """Of its own shards that it hands in before a verdict falls: auditors are slow."""
    jury: Jury = HONEST
    shards: int = 40


STRATEGIES: dict[str, Strategy] = {
    "always": Strategy("every shard, in one wallet"),
    "always, slow verdicts": Strategy("every shard, each verdict ten shards late", delay=10),
    "whitewash": Strategy("every shard, with a new wallet after each catch", fresh="catch"),
    "whitewash, slow verdicts": Strategy("the same, verdicts ten shards late", fresh="catch", delay=10),
    "a wallet a shard": Strategy("every shard, each in a wallet of its own", fresh="shard"),
    "when the queue is full": Strategy("honest until nine shards wait for their vesting", lambda n: n.place >= VESTING),
    "full queue, slow verdicts": Strategy("the same, verdicts ten shards late", lambda n: n.place >= VESTING, delay=10),
    "the last shards": Strategy("the last five before the job's end", lambda now: now.shard >= now.shards - 5),
    "the last shards, slow verdicts": Strategy(
        "the last ten before the job's end, all handed in before any verdict",
        lambda n: n.shard >= n.shards - 10,
        delay=40,
    ),
    "the very last shard": Strategy("nothing but the last", lambda now: now.shard == now.shards - 1),
    "a few and away": Strategy("three shards and no more: a late one, a spare one, a job that is cancelled", shards=3),
    "now and then": Strategy("every fifth shard", lambda now: now.shard % 5 == 4),
    "bought name": Strategy("a wallet with nine honest shards, bought", lambda now: now.place >= VESTING, shards=15),
    "one yes-man of ten auditors": Strategy(
        "every shard, from the tenth on", lambda n: n.place >= VESTING, jury=Jury(0.1)
    ),
    "yes-men, a quarter": Strategy("the same", lambda n: n.place >= VESTING, jury=Jury(0.25)),
    "yes-men, half": Strategy("the same", lambda n: n.place >= VESTING, jury=Jury(0.5)),
    "a pair who audit each other": Strategy(
        "the same; nobody else has earned it", lambda n: n.place >= VESTING, jury=Jury(1.0, trusted=trusted(1))
    ),
    "six who audit each other": Strategy(
        "the same; nobody else has earned it", lambda n: n.place >= VESTING, jury=Jury(1.0, trusted=trusted(5))
    ),
    "twenty who audit each other": Strategy(
        "the same; every second comes to the operator first", lambda n: n.place >= VESTING, jury=Jury(1.0)
    ),
    "nobody but the cheat's friends": Strategy(
        "every shard; the operator's auditor has nobody who confirms it", jury=Jury(1.0, trusted=1.0, others=False)
    ),
    "a tenth unaudited, a wallet a shard": Strategy("each", fresh="shard", jury=Jury(absent=0.1)),
    "a third unaudited": Strategy(
        "every shard from the tenth on", lambda n: n.place >= VESTING, jury=Jury(absent=1 / 3)
    ),
    "nobody audits": Strategy("every shard", jury=Jury(absent=1.0)),
}
"""Silence after a bad draw, and answering only draws that one likes, are `always`: who does not answer is rejected."""


class Outcome(NamedTuple):
    paid: float
    forged: float
    """In shards."""
    caught: int | None
    """After how many forged shards the first verdict fell against one; None for never."""


def play(strategy: Strategy, share: Fraction, chance: random.Random) -> Outcome:
    wallets, forged, count, first = [Wallet()], 0, int(share * SEGMENTS), None
    tries = 0
    for shard in range(strategy.shards):
        for wallet in wallets:
            wallet.hear(shard)
        wallet = wallets[-1]
        if wallet.rows and (
            strategy.fresh == "shard" or (strategy.fresh == "catch" and wallet.lost == len(wallet.rows))
        ):
            wallets.append(wallet := Wallet())
        cheats = strategy.forges(Now(shard, strategy.shards, len(wallet.rows)))
        wallet.hand_in(shard, count if cheats else 0, chance, strategy.jury, strategy.delay)
        forged, tries = forged + count * cheats, tries + cheats
        if strategy.delay == 0:
            wallet.hear(shard)
        if first is None and any(each.caught for each in wallets):
            first = tries
    for wallet in wallets:
        wallet.hear(NEVER - 2)
    if first is None and any(each.caught for each in wallets):
        first = tries
    return Outcome(sum(wallet.paid for wallet in wallets), forged / SEGMENTS, first)


def gains(name: str, share: Fraction, games: int, seed: int) -> dict[str, Any]:
    """Of many jobs: caught within so many forged shards, and by cost the gain per shard, relative and absolute."""
    strategy, chance = STRATEGIES[name], random.Random(f"{seed}|{name}|{share}")
    outcomes = [play(strategy, share, chance) for _ in range(games)]
    count = strategy.shards
    found: dict[str, Any] = {"f": float(share)}
    for within in WITHIN:
        found[f"caught within {within}"] = round(fmean(_within(each, within) for each in outcomes), 3)
    for cost in COSTS:
        per_shard = [(each.paid - count + cost * each.forged) / count for each in outcomes]
        found[f"gain at c={cost:g}"] = round(fmean(per_shard), 4)
        found[f"absolute at c={cost:g}"] = round(fmean(per_shard) + 1 - cost, 4)
    found["error"] = round(stdev(each.paid / count for each in outcomes) / math.sqrt(games), 4)
    return found


def _within(outcome: Outcome, shards: int) -> bool:
    return outcome.caught is not None and outcome.caught <= shards


def unhurt(jury: Jury, games: int, seed: int) -> dict[str, float]:
    """What auditors who say no to everybody, and are never shut out for it, cost honest workers of forty shards."""
    chance = random.Random(f"{seed}|{jury}")
    lost = []
    for _ in range(games):
        wallet = Wallet()
        for shard in range(40):
            wallet.hand_in(shard, 0, chance, jury, 0)
            wallet.hear(shard)
        lost.append(40 - wallet.paid)
    return {"lost per shard": round(fmean(lost) / 40, 5), "hurt": round(fmean(loss > 0 for loss in lost), 4)}


def race(honest: int, busy: float, *, idle: bool, games: int, seed: int) -> float:
    """How often one colluding auditor who waits idle gets its friend's replay, of `honest` others who look for work
    every `busy` seconds; and where the operator's is `idle` too."""
    chance = random.Random(f"{seed}|{honest}|{busy}|{idle}")
    won = 0
    for _ in range(games):
        line = ["friend", *(str(at) for at in range(honest))]
        chance.shuffle(line)
        if idle:
            line.insert(0 if chance.random() < trusted(honest + 1) else 1, "trusted")
        free = {who: 0.0 if who in ("friend", "trusted") else chance.uniform(0, busy) for who in line}
        asked = {who: STEP * math.ceil(math.log2(place)) for place, who in enumerate(line, 1)}
        taken = min(line, key=lambda who: (max(free[who], asked[who]), asked[who]))
        won += taken == "friend" and max(free[taken], asked[taken]) < TIMEOUT
    return round(won / games, 3)


def break_even() -> list[dict[str, float | None]]:
    """How many audits of a full queue may fail to catch a forgery, by cost, before forging pays; and of a newcomer's
    first shard. And which share of yes-men among auditors makes so many: None where not even all of them do."""
    found: list[dict[str, float | None]] = []
    for cost in COSTS:
        missed = max(0.0, 1 - cost / float(probability(VESTING + 1) * (VESTING + 1)))
        friends = next((q / 1000 for q in range(1001) if _passes(q / 1000) >= missed), None)
        row = {"c": cost, "missed": round(missed, 3), "missed, first shard": round(1 - cost, 3), "yes-men": friends}
        found.append(row)
    return found


def _passes(friends: float) -> float:
    """Of forged work that is audited: one yes is enough, of whoever comes first."""
    return (1 - LEAST_TRUSTED) * friends


def overhead() -> dict[str, float]:
    """Of trained tokens, how many are replayed: over a wallet's first ten shards, and after. Ringers are replays too;
    honest work in one class needs no second opinion."""
    paid = 1 + (1 - LEAST_TRUSTED) * RINGERS / (1 - RINGERS)
    first = sum(float(probability(at_risk(place, 0))) for place in range(1, 11)) / 10 / SEGMENTS
    after = float(probability(VESTING + 1)) / SEGMENTS
    return {
        "first": 100 * first,
        "after": 100 * after,
        "first, ringers": 100 * first * paid,
        "after, ringers": 100 * after * paid,
    }


def money() -> list[dict[str, float]]:
    """What audits cost, in % of the shards' pay, where each wallet does so many shards: against `check.spend`. A
    rejection takes two replays."""
    found = []
    for shards in (1, 2, 3, 5, 10, 40):
        drawn = fmean(float(probability(at_risk(place, 0))) for place in range(1, shards + 1))
        honest, forged = 100 * drawn / SEGMENTS, 200 * drawn / SEGMENTS
        found.append({"shards a wallet": shards, "all honest": round(honest, 2), "all forged": round(forged, 2)})
    return found


MODELS = {"Llama-2-7B r16": 39.98, "Llama-3-8B r16": 41.94, "1.2B r16": 11.27, "0.5B r8": 4.40}
"""Millions of LoRA parameters, all linear layers."""


def traffic() -> list[dict[str, Any]]:
    """MB per audit: a state is 8 bytes a parameter. A worker sends the drawn segment's start but for the first's, and
    the shard's last; an auditor fetches the start, and sends its end only where it is another."""
    found = []
    for model, millions in MODELS.items():
        state = 8 * millions
        up = state * (1 + (SEGMENTS - 1) / SEGMENTS)
        row = {
            "state": state,
            "up, by the worker": up,
            "down, by the auditor": state,
            "up again if it differs": 2 * state,
        }
        row["up, a shard on average"] = up * float(probability(VESTING + 1))
        found.append({"model": model, **{name: round(value) for name, value in row.items()}})
    return found


def main() -> int:
    begin("cheating")
    parser = argparse.ArgumentParser(description="What cheating pays, over the hub's decision code.")
    parser.add_argument("--games", type=int, default=1000, help="jobs for each strategy and share (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--quick", action="store_true", help="20 jobs each")
    given = parser.parse_args()
    games, seed = 20 if given.quick else given.games, given.seed
    figures: list[report.Figure] = []
    tables: dict[str, Any] = {}
    for name, strategy in STRATEGIES.items():
        log.info("%s", name)
        tables[name] = {"says": strategy.says, "rows": [gains(name, share, games, seed) for share in SHARES]}
        figures += _judged(name, tables[name]["rows"])
    figures += _costs_of_checking()
    liars = {f"{share:.0%}": unhurt(Jury(liars=share), games, seed) for share in (0.0, 0.05, 0.1, 0.25)}
    figures.append(report.at_most("honest workers hurt, honest auditors", liars["0%"]["hurt"], "of workers", 0.0))
    races = [
        {"others": honest, "look every, s": busy, "operator idle": idle,
         "friend gets it": race(honest, busy, idle=idle, games=10 * games, seed=seed)}
        for honest in (0, 3, 10, 30) for busy in (60.0, 600.0) for idle in (False, True)
    ]  # fmt: skip
    worst = max(row["friend gets it"] for row in races if row["operator idle"])
    figures.append(
        report.at_most("an idle friend gets the replay, the operator's auditor idle", worst, "of audits", 0.5)
    )
    worst = max(row["friend gets it"] for row in races if not row["operator idle"] and row["others"])
    figures.append(report.at_most("an idle friend gets the replay, no operator's auditor", worst, "of audits", 0.5))
    first, spend = money()[0], 100 * CheckEntry().share(SEGMENTS)
    figures.append(report.at_most("audits of wallets of one shard, honest", first["all honest"], "% of pay", spend))
    figures.append(report.at_most("audits of wallets of one shard, forged", first["all forged"], "% of pay", spend))
    more = {
        "gains": tables,
        "break even": break_even(),
        "lying auditors": liars,
        "race": races,
        "audits in % of pay": money(),
        "MB per audit": traffic(),
    }
    settings = {"games": games, "seed": seed, "segments": SEGMENTS, "job": JOB, "costs": COSTS}
    report.write(report.document("cheating", PACKAGES, settings, figures, **more))
    return 0


def _judged(name: str, rows: Sequence[dict[str, Any]]) -> list[report.Figure]:
    """The best that a strategy can do beside honest work, where that leaves something and where it leaves nothing; and
    what nothing at all is paid. Two errors are allowed for where the draw of lots decides."""
    found = []
    for costs, target in ((COSTS[:-1], "< 0"), (COSTS[-1:], "<= 0")):
        best, cost, share, error = max(
            (row[f"gain at c={c:g}"], c, row["f"], row["error"]) for row in rows for c in costs
        )
        holds = best < 0 if target == "< 0" else best <= 2 * error
        at = f"c={cost:g}, f={share:g}, +-{error:.3f}"
        where = "all of the pay" if cost == 1 else "less than the pay"
        found.append(report.must(f"{name}: best gain, work costs {where}", best, "pay/shard", target, holds, peer=at))
    if STRATEGIES[name].fresh != "never":
        idle = rows[-1]["absolute at c=1"]
        found.append(report.must(f"{name}: paid for nothing", idle, "pay/shard", "<= 0", idle <= 0))
    return found


def _costs_of_checking() -> list[report.Figure]:
    part, sizes = overhead(), traffic()[0]
    return [
        report.at_most("replayed of the first ten shards", part["first"], "%", 5.0, digits=2),
        report.at_most("replayed of later shards", part["after"], "%", 2.0, digits=2),
        report.at_most("replayed of the first ten shards, ringers counted", part["first, ringers"], "%", 5.0, digits=2),
        report.at_most("replayed of later shards, ringers counted", part["after, ringers"], "%", 2.0, digits=2),
        report.at_most("sent by the worker per audit, 7B", sizes["up, by the worker"], "MB", 350),
        report.at_most("sent by the worker per shard, 7B, on average", sizes["up, a shard on average"], "MB", 50),
    ]


if __name__ == "__main__":
    raise SystemExit(main())
