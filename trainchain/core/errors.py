"""The one kind of expected failure, and the table of every reason code with its HTTP status and exit code.

Imports nothing but the standard library. Exit codes: 0 done; 1 refused or failed for good; 2 usage; 3 try again
later; 4 a check, proof or digest did not hold; 5 the job ended badly; 6 money; 7 key or password; 8 pending.
"""

from typing import Any, NamedTuple


class Reason(NamedTuple):
    """What a code means to a program (`status`, `exit_code`) and to a person (`meaning`)."""

    status: int
    exit_code: int
    meaning: str


class TrainChainError(Exception):
    """An expected failure: shown as a message and a hint, never as a traceback.

    `code` is stable and stands in `CODES`; `facts` are JSON values that travel with it (a receipt, two digests).
    """

    def __init__(self, code: str, message: str, *, hint: str = "", **facts: Any) -> None:
        super().__init__(message)
        self.reason = CODES[code]
        self.code = code
        self.message = message
        self.hint = hint
        self.facts = facts

    @property
    def status(self) -> int:
        return self.reason.status

    @property
    def exit_code(self) -> int:
        return self.reason.exit_code


CODES: dict[str, Reason] = {
    # usage: the recipe, the flags, the files named in them
    "usage.flag": Reason(400, 2, "A flag or argument is missing or not understood."),
    "usage.file": Reason(400, 2, "A file named on the command line is missing or cannot be read."),
    "recipe.not_yaml": Reason(422, 2, "The recipe is not a YAML mapping."),
    "recipe.unknown_key": Reason(422, 2, "The recipe has a key that TrainChain does not know."),
    "recipe.unsupported": Reason(422, 2, "The recipe asks for something this version does not do."),
    "recipe.invalid": Reason(422, 2, "A value in the recipe has the wrong type or is out of range."),
    "source.missing": Reason(422, 2, "A model folder or data file of the recipe does not exist."),
    "source.unsupported": Reason(422, 2, "The address of a model or data set is of a kind this version cannot read."),
    "source.address": Reason(422, 2, "The address of a model or data set is not written as any kind known."),
    "source.not_found": Reason(404, 1, "There is no such repository, or it is private and the token does not open it."),
    "source.gated": Reason(403, 1, "The repository's terms have to be accepted before its files can be fetched."),
    "source.token": Reason(401, 7, "The token or sign-in that was sent to a model hub is not accepted."),
    "source.forbidden": Reason(403, 1, "The token or sign-in is accepted, but may not do that."),
    "source.unavailable": Reason(503, 3, "A model hub did not answer, or is busy, after bounded retries."),
    "source.incomplete": Reason(422, 1, "The source lacks a file that belongs to the model, or a part of one."),
    "source.unsafe": Reason(422, 1, "The source has names, sizes or numbers of files that are not taken."),
    "source.changed": Reason(409, 4, "A file of a pinned source is not the one that the job was published with."),
    "source.needs_extra": Reason(422, 2, "A library for this kind of source is not installed."),
    "model.unreadable": Reason(422, 2, "The base model folder cannot be loaded as a model with safetensors weights."),
    "data.empty": Reason(422, 2, "A data set has no usable rows."),
    "data.format": Reason(422, 2, "A data row does not have the fields its format asks for."),
    "data.too_small": Reason(422, 2, "The data holds too little to fill one step."),
    "data.count_mismatch": Reason(409, 4, "A worker counted other tokens in a shard than the resolved recipe pins."),
    # the machine and the network
    "hub.unreachable": Reason(503, 3, "The hub did not answer after bounded retries."),
    "hub.failed": Reason(502, 3, "The hub answered with a failure of its own."),
    "hub.not_a_hub": Reason(502, 1, "The address answers, but not as a TrainChain hub."),
    "hub.protocol": Reason(426, 1, "Hub and client speak different protocol versions."),
    "hub.other_version": Reason(409, 1, "The hub's folder was written by another version of TrainChain."),
    "hub.address_in_use": Reason(409, 1, "The address to listen on is taken."),
    "http.bad_request": Reason(422, 1, "A request to the hub is malformed."),
    "http.not_found": Reason(404, 1, "The hub has nothing at that address."),
    "http.too_large": Reason(413, 1, "A request body is larger than its cap; it was not read to the end."),
    "http.length_required": Reason(411, 1, "A body was sent without its length."),
    "http.range": Reason(416, 1, "A part of an object was asked for that it does not have."),
    "session.required": Reason(401, 7, "The request needs a session signed by a wallet."),
    "session.refused": Reason(403, 7, "The sign-in message does not hold: wrong signature, nonce, domain or time."),
    "session.forbidden": Reason(403, 7, "The wallet of this session may not do that."),
    # jobs, leases, objects
    "job.unknown": Reason(404, 1, "No job has that id, prefix or name."),
    "job.ambiguous": Reason(409, 2, "More than one job fits that prefix or name."),
    "job.invalid": Reason(422, 1, "The resolved recipe that was published does not hold together."),
    "job.not_ready": Reason(409, 8, "The job has not come to the point where that can be had."),
    "job.incomplete": Reason(409, 1, "Objects of the job have not been uploaded yet."),
    "job.unfunded": Reason(402, 6, "The escrow does not hold what the next round can cost."),
    "job.closed": Reason(409, 1, "The job has ended."),
    "job.ended_badly": Reason(409, 5, "The job was cancelled or expired."),
    "lease.unknown": Reason(404, 1, "No such lease was ever given."),
    "lease.not_yours": Reason(403, 1, "The lease belongs to another wallet."),
    "lease.lost": Reason(409, 1, "The lease ran out and its shard went on without it."),
    "object.unknown": Reason(404, 1, "The hub does not hold an object of that name."),
    "object.unexpected": Reason(409, 1, "The job does not name that object."),
    "object.digest": Reason(422, 4, "The bytes do not have the digest they were sent or asked for under."),
    # why a contribution is refused
    "contribution.bad_signature": Reason(403, 4, "The contribution is not signed, or not by the worker it names."),
    "contribution.wrong_worker": Reason(403, 1, "The contribution names another worker than the session's wallet."),
    "contribution.wrong_job": Reason(409, 1, "The contribution names another job than its lease."),
    "contribution.wrong_round": Reason(409, 1, "The contribution names a round or shard other than its lease's."),
    "contribution.wrong_start": Reason(409, 1, "The contribution started from another adapter than the round's."),
    "contribution.too_late": Reason(
        409, 1, "The round after the contribution's own has closed too: nothing takes it in any more."
    ),
    "contribution.repeat": Reason(409, 1, "This contribution was already accepted; its receipt comes along."),
    "contribution.encoding": Reason(422, 1, "The delta is encoded otherwise than the recipe says."),
    "contribution.segments": Reason(
        422, 1, "The contribution does not tell micro_tokens, of a batch at most, once for each segment of the recipe."
    ),
    "shard.already_accepted": Reason(409, 1, "Somebody's contribution for this shard was already accepted."),
    "delta.missing": Reason(409, 1, "The contribution names a delta that was not uploaded."),
    "delta.wrong_digest": Reason(422, 1, "The uploaded bytes are not those the digest names."),
    "delta.too_large": Reason(413, 1, "The delta is larger than the recipe's tensors; it was not read to the end."),
    "delta.not_safetensors": Reason(422, 1, "The delta is not a safetensors file."),
    "delta.missing_tensor": Reason(422, 1, "The delta lacks a tensor of the adapter."),
    "delta.extra_tensor": Reason(422, 1, "The delta has a tensor that the adapter has not."),
    "delta.wrong_shape": Reason(422, 1, "A tensor of the delta has another shape than the adapter's."),
    "delta.wrong_dtype": Reason(422, 1, "A tensor of the delta has another dtype than its encoding."),
    "delta.not_canonical": Reason(422, 1, "The delta's file is not the one its encoding makes of its numbers."),
    "delta.not_finite": Reason(422, 1, "The delta holds NaN or infinity."),
    "delta.out_of_reach": Reason(422, 1, "An element moved further than the optimizer can move it in the shard."),
    # why an answer to a draw, or a replay, is refused; and what a verdict says
    "audit.none": Reason(409, 1, "Nothing is wanted of this lease: no draw fell on it, or it is answered."),
    "audit.answer_invalid": Reason(
        422, 4, "What was opened or uploaded to answer a draw does not hold; nothing changed."
    ),
    "audit.too_late": Reason(409, 1, "The time to answer the draw, or to replay it, is over."),
    "replay.invalid": Reason(422, 4, "A replay is not signed by its auditor, or is not of what its lease asks for."),
    "draw.invalid": Reason(502, 4, "The hub has not signed the secret that draws the audits of a lease's round."),
    "receipt.invalid": Reason(502, 4, "The hub's receipt is not signed by it, or promises another amount."),
    "voucher.invalid": Reason(502, 4, "The hub's voucher is not signed by it, or promises less than has vested."),
    "worker.unsettled": Reason(402, 6, "A hub owes more that has vested, and is not settled, than the worker allows."),
    # private jobs
    "access.denied": Reason(403, 1, "The job does not admit this wallet."),
    "access.not_your_hub": Reason(
        409, 1, "The recipe wants its keys kept by a hub of the owner's own, and this is not one."
    ),
    "key.invalid": Reason(422, 4, "An exchange key, or a key wrapped for one, does not hold."),
    "seal.broken": Reason(422, 4, "A sealed file does not open with its key: it is damaged, or another one."),
    # publishing an adapter
    "push.conflict": Reason(409, 3, "Somebody else changed the target while the adapter was pushed."),
    # the worker's disk
    "cache.full": Reason(507, 1, "What is needed does not fit the cap of the cache."),
    "cache.damaged": Reason(422, 4, "Files in the cache are not what their names say."),
    "cache.in_use": Reason(409, 1, "A running process uses that part of the cache."),
    "disk.full": Reason(507, 1, "The disk has no room for what is needed."),
    # training
    "adapter.unreadable": Reason(422, 1, "A folder is missing, or holds no LoRA adapter in safetensors."),
    "adapter.unfit": Reason(422, 2, "The adapter does not fit the recipe or the base: other modules, rank or widths."),
    "train.child_died": Reason(500, 1, "The training process ended without a result."),
    "train.out_of_memory": Reason(507, 1, "The shard does not fit this machine's memory."),
    "train.diverged": Reason(500, 1, "The loss, a gradient or a weight stopped being a finite number."),
    "train.unsupported": Reason(422, 1, "This machine lacks what the recipe demands: a device, a kernel, a library."),
    "state.invalid": Reason(422, 4, "A segment's state is not what a state of this adapter must be."),
    "merge.unmergeable": Reason(422, 1, "The adapters cannot be merged exactly by this method."),
    # chain, wallet, money
    "chain.unreachable": Reason(503, 3, "The chain's RPC did not answer after bounded retries."),
    "chain.timeout": Reason(504, 3, "The chain did not include a transaction in time; it may still."),
    "chain.wrong": Reason(409, 1, "The chain id or the contract's code is not what it should be."),
    "chain.unknown": Reason(422, 1, "The chain's address is of a kind TrainChain does not know."),
    "chain.reverted": Reason(409, 1, "A contract refused the call; its error names the values."),
    "chain.denied": Reason(403, 1, "The embedded chain's public door does not offer that method."),
    "chain.foreign_key": Reason(403, 7, "The key is a test chain's own, and signs for no other chain."),
    "chain.journal": Reason(409, 1, "The note of the transactions under way cannot be read."),
    "claim.nothing": Reason(409, 1, "None of the leaves that were sent pays anything now."),
    "claim.not_relayed": Reason(403, 1, "This hub does not send other people's claims."),
    "claim.too_often": Reason(
        429, 3, "The account's last claim was relayed less than a minute ago, or many are on their way."
    ),
    "faucet.closed": Reason(403, 6, "This hub's chain is not an embedded one, or this wallet has had its share."),
    "settlement.mismatch": Reason(409, 4, "The leaves file, the proof and the root on chain do not agree."),
    "verify.rewards": Reason(409, 4, "Contributions, receipts and the accepted shards of a job do not agree."),
    "verify.leaves": Reason(409, 4, "A settlement's leaves are not those that follow from the rewards."),
    "verify.root": Reason(409, 4, "A settlement's root or total is not that of its leaves."),
    "verify.chain": Reason(409, 4, "What the escrow holds or has paid for a job is not what it should be."),
    "verify.draws": Reason(409, 4, "An audit was skipped, invented or moved: it is not what the round's secret draws."),
    "verify.evidence": Reason(409, 4, "A verdict does not follow from its evidence, or there is none."),
    "verify.forfeits": Reason(409, 4, "More or less is forfeited, or paid for replays, than the rule says."),
    "doctor.calibration": Reason(422, 4, "A golden segment ends beyond the tolerance on this machine."),
    "money.not_an_amount": Reason(422, 2, "The text is not an amount of tokens."),
    "money.insufficient": Reason(402, 6, "The wallet does not hold enough tokens or gas."),
    "money.budget_too_small": Reason(422, 6, "The budget is below the price of the work."),
    "money.too_early": Reason(409, 8, "Money can be reclaimed only after the deadline and the grace time."),
    "wallet.missing": Reason(404, 7, "There is no wallet at that place."),
    "wallet.exists": Reason(409, 7, "A wallet is already at that place; nothing was overwritten."),
    "wallet.unreadable": Reason(422, 7, "The wallet file is not a version 3 keystore."),
    "wallet.wrong_password": Reason(403, 7, "The password does not open the wallet."),
    "wallet.locked": Reason(403, 7, "The wallet needs a password, and nobody could be asked."),
    "wallet.keyring": Reason(
        503, 7, "The system's keyring is not there, is locked, or does not keep what it is given."
    ),
}
