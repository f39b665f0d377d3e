"""What a card tells of a job: its training, losses, workers, checks and pay, and how to recheck them."""

from collections.abc import Iterator

from trainchain.core import money
from trainchain.core.evidence import REJECTS
from trainchain.core.history import Chain, History, shares
from trainchain.core.markdown import bullets, code, count, table
from trainchain.core.models import Counts, ResolvedRecipe

MODULES = 12
"""So many kinds of modules are listed by name."""

VERIFY = "python -c \"from trainchain.cli.delivery import verify; print(verify('DIR'))\""

CHECKS = (
    "**Signed.** Every contribution is signed by its worker's wallet: job, round, shard, lease, start adapter, delta, "
    "and the Merkle root of the states it went through. The hub answered with a signed receipt.",
    "**Cheap checks of every delta, before it was accepted.** Size, safetensors format, the names, shapes and dtype of "
    "its tensors, no NaN or infinity, no element further from the start than the optimizer can move it in one shard, "
    "the bytes that were signed, and none twice in the job.",
    "**A merge that can be recomputed.** Each round's adapter is a fixed function of its start and its deltas.",
)
NO_REPLAY = (
    "**No replay.** Nobody trained a part of a shard again to compare. A worker who did not train as the recipe says, "
    "but handed in a delta that passes the cheap checks, was not found out by them."
)


def training(recipe: ResolvedRecipe, history: History, round_: int) -> Iterator[str]:
    settings, lora = recipe.training, recipe.lora
    trained = _trained(recipe, history, round_)
    tokens, supervised = sum(one.tokens for one in trained), sum(one.supervised for one in trained)
    yield "## Training"
    yield table(
        ("What", "Value"),
        [
            ("Rounds x shards x steps", f"{round_} x {recipe.shards} x {recipe.steps}"),
            ("Shards accepted and merged", _merged(recipe, history, round_)),
            ("Tokens through the model", f"{tokens:,}, {supervised:,} of them with loss"),
            ("Sequences", f"packed to {settings.sequence_len} tokens, {settings.batch_size} in a step"),
            ("LoRA", f"rank {lora.r}, alpha {lora.alpha}, no dropout, in fp32"),
            ("Learning rate", _rate(recipe)),
            (
                "Optimizer",
                f"AdamW, betas {settings.adam_beta1:g} and {settings.adam_beta2:g}, epsilon {settings.adam_epsilon:g}, "
                f"weight decay {settings.weight_decay:g}, gradients clipped to {settings.max_grad_norm:g}, "
                "without moments at the start of each shard",
            ),
            ("Merge of a round", f"{recipe.merge.method} of the accepted deltas, weighted by their tokens"),
            ("Seed", str(settings.seed)),
        ],
    )
    names = list(dict.fromkeys(target.rpartition(".")[2] for target in lora.targets))
    more = f" and {len(names) - MODULES} others" if len(names) > MODULES else ""
    shown = ", ".join(code(name, 80) for name in names[:MODULES])
    yield f"The adapter is on {count(len(lora.targets), 'module')} of the base: {shown}{more}."


def losses(recipe: ResolvedRecipe, history: History, round_: int) -> Iterator[str]:
    yield "## Held-out loss"
    if recipe.held_out is None:
        yield "The job has no held-out data, so no loss was measured. Nothing else was evaluated."
        return
    yield (
        "Mean negative log-likelihood of the held-out tokens that carry loss, measured by the hub or the job's owner, "
        "never by a worker. Nothing else was evaluated."
    )
    rows = [("none: the base", "0", _loss(history, 0))]
    for number in range(1, round_ + 1):
        tokens = sum(one.tokens for one in _trained(recipe, history, round_, only=number))
        rows.append((f"round {number}", f"{tokens:,}", _loss(history, number)))
    yield table(("After", "Tokens", "Loss"), rows)


def workers(recipe: ResolvedRecipe, history: History, round_: int) -> Iterator[str]:
    yield "## Workers"
    rows = [(f"`{one.worker}`", str(one.accepted), f"{one.tokens:,}") for one in shares(recipe, history, round_)]
    yield table(("Wallet", "Shards accepted", "Tokens"), rows)


def checks(recipe: ResolvedRecipe, history: History, round_: int, *, evidence: bool) -> Iterator[str]:
    """`evidence` is whether the audit bundle lies beside the card."""
    here = "Both are in `trainchain/contributions.json` beside the adapter."
    there = "Both stand in the evidence that `trainchain push` puts beside the adapter."
    signed, *others = CHECKS
    yield "## How it was checked"
    yield bullets([f"{signed} {here if evidence else there}", *others, _audits(recipe, history, round_)])


def _audits(recipe: ResolvedRecipe, history: History, round_: int) -> str:
    """In one line what was trained again, and what came of it."""
    if not recipe.audited:
        return NO_REPLAY
    codes = history.verdicts(round_)
    rejected = sum(number for code_, number in codes.items() if code_ in REJECTS)
    parts = [(codes["audit.passed"], "passed"), (rejected, "rejected"), (codes["audit.undecided"], "undecided")]
    parts += [(codes["audit.unaudited"], "unaudited, for want of an auditor"), (codes[""], "not decided yet")]
    told = ", ".join(f"{number} {what}" for number, what in parts if number)
    return (
        f"**Replays by chance.** Of what is merged here, a segment of {count(sum(codes.values()), 'shard')} was drawn "
        f"to be trained again by others, by secrets that were signed before{': ' + told if told else ''}. What was "
        "rejected is not paid; where it had been merged by then, the adapter still holds it."
    )


def pay(recipe: ResolvedRecipe, history: History, chain: Chain, round_: int) -> Iterator[str]:
    yield "## Pay"
    earned = sum(one.reward for one in shares(recipe, history, round_))
    whose = " That chain is the hub's own: its tokens are promises of the hub's operator." if chain.embedded else ""
    yield (
        f"The workers earned {money.show(earned)} {code(recipe.pay.token, 40)} for it, from escrow `{chain.escrow}` on "
        f"chain {chain.chain_id}, job `{history.job}`, owner `{history.owner}`.{whose}"
    )
    lost = history.forfeited(recipe, round_)
    if lost:
        yield f"{money.show(lost)} {code(recipe.pay.token, 40)} more were forfeited with work that was rejected."
    settled = history.settled(round_)
    if not settled:
        yield "It was not settled on chain yet when this was written."
        return
    yield "Settled on chain, cumulative over the job:"
    rows = [(str(row.round), money.show(row.total), f"`{row.root}`", f"`{row.tx}`") for row in settled]
    yield table(("Settlement", "Total", "Merkle root", "Transaction"), rows)


def recheck(recipe: ResolvedRecipe, history: History, round_: int) -> Iterator[str]:
    """Beside an adapter, whose audit bundle is there."""
    given = "its owner and its workers" if recipe.private else "anybody"
    yield "## How to recheck it"
    yield bullets(
        [
            f"`trainchain/recipe.json` is the resolved recipe. Its sha256 is the spec hash `{recipe.spec_hash}`, which "
            "stands in escrow.",
            f"`adapter_model.safetensors` has the sha256 `{_adapter(history, round_)}`, as the hub gave it out.",
            "`contributions.json`, `fees.json`, `losses.json`, `settlements.json` and the `leaves` files in "
            "`trainchain/` hold every accepted contribution with its signature and receipt, what replays earned, the "
            "losses, and who was paid what.",
            f"`{VERIFY}` checks all of these offline; DIR is this folder.",
            f"A round is merged again from its start adapter and its deltas, which the hub gives to {given} under "
            "their digests for as long as it keeps the job. B x A agrees to a relative 1e-6, and bit for bit with the "
            "same build of numpy on one thread.",
        ]
    )


def folding(recipe: ResolvedRecipe, history: History, round_: int, dtype: str) -> Iterator[str]:
    """Beside a base with the adapter folded in."""
    quantised = (
        " It was trained on the base in 4 bits (NF4); here it is in weights that were not quantised."
        if recipe.training.quantization == "nf4"
        else ""
    )
    yield "## How it was made"
    yield (
        f"The weights are the base's plus scale x B x A, the scale being {recipe.lora.alpha}/{recipe.lora.r}, computed "
        f"in fp32 and rounded once to {dtype}. The adapter has the sha256 `{_adapter(history, round_)}`; "
        f"`trainchain pull {history.job[:12]} --round {round_}` fetches it.{quantised}"
    )
    yield f"The job's spec hash, which stands in escrow, is `{recipe.spec_hash}`."


def _trained(recipe: ResolvedRecipe, history: History, round_: int, only: int | None = None) -> list[Counts]:
    """The pinned counts of all shards that were merged through a round, or in one of them."""
    rows = [row for row in history.through(round_) if only in (None, row.round)]
    return [recipe.counts[trained - 1][shard.shard] for row in rows for trained, shard in history.taken(row.round)]


def _merged(recipe: ResolvedRecipe, history: History, round_: int) -> str:
    taken = [(row.round, *one) for row in history.through(round_) for one in history.taken(row.round)]
    spare = sum(shard.shard >= recipe.shards for _, _, shard in taken)
    late = sum(merged != trained for merged, trained, _ in taken)
    text = f"{len(taken) - spare} of {round_ * recipe.shards}"
    text += f", and {count(spare, 'spare shard')}" if spare else ""
    return text + (f"; {late} came one round late and had half their weight" if late else "")


def _rate(recipe: ResolvedRecipe) -> str:
    settings = recipe.training
    warm = [
        f"{count(steps, 'step')} of warm-up at the start of {what}"
        for steps, what in ((settings.warmup_steps, "the job"), (settings.shard_warmup_steps, "each shard"))
        if steps
    ]
    kind = {"constant": "constant", "cosine": "down to 0 along a half cosine"}[settings.lr_scheduler]
    return ", ".join([f"{settings.learning_rate:g}, {kind}", *warm])


def _loss(history: History, round_: int) -> str:
    loss = history.loss(round_)
    return "not measured" if loss is None else f"{loss:.4f}"


def _adapter(history: History, round_: int) -> str | None:
    return next((row.adapter for row in history.rounds_done if row.round == round_), None)
