"""What the hub signed for this wallet, kept on this disk: a receipt for every accepted shard, and of each job the
voucher that promises most. Written down before the next lease is taken; only what was checked counts."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from filelock import FileLock

from trainchain.core.errors import TrainChainError
from trainchain.core.history import Receipt
from trainchain.core.messages import Verdicts, Voucher
from trainchain.core.models import parse
from trainchain.core.rewards import VESTING
from trainchain.core.settings import private_folder, write_private

Signed = Callable[[str, Mapping[str, Any], str], bool]
"""(the typed message's kind, its fields as they should be, a signature): whether the hub of the escrow signed that."""
REFUSED = "refused"
"""The folder beside those that count, where what did not hold is kept as evidence."""


class Ties(NamedTuple):
    """What a promise is bound to."""

    chain_id: int
    escrow: str
    hub: str

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ties) and self._plain() == other._plain()

    def __hash__(self) -> int:
        return hash(self._plain())

    def _plain(self) -> tuple[int, str, str]:
        return self.chain_id, self.escrow.lower(), self.hub.lower()


class Papers:
    """The receipts and vouchers of one wallet as they lie in its home, for whoever reads them. Files that are torn, of
    another wallet or of another version are passed over."""

    def __init__(self, home: Path, account: str) -> None:
        self.home = home
        self.account = account
        self._read: dict[str, dict[str, Receipt | None]] = {}

    def jobs(self) -> list[str]:
        """Jobs of which anything lies here."""
        folders = self.home / "receipts", self.home / "vouchers"
        names = {path.name.removesuffix(".json") for folder in folders if folder.is_dir() for path in folder.iterdir()}
        return sorted(name for name in names if name.startswith("0x") and (self.receipts(name) or self.voucher(name)))

    def receipts(self, job: str) -> list[Receipt]:
        """By place. A file is read once: what lies there never changes."""
        folder, read = self.home / "receipts" / job, self._read.setdefault(job, {})
        try:
            names = [path.name for path in folder.iterdir()]
        except OSError:
            return []
        for name in names:
            if name.startswith("0x") and name.endswith(".json") and name not in read:
                read[name] = self._receipt(folder / name, job)
        found = [receipt for receipt in read.values() if receipt is not None]
        return sorted(found, key=lambda receipt: receipt.place)

    def path(self, receipt: Receipt) -> Path:
        return self.home / "receipts" / receipt.jobId / f"{receipt.lease}.json"

    def voucher(self, job: str) -> Voucher | None:
        """The one that promises most."""
        try:
            found = parse(Voucher, self._voucher_path(job).read_bytes(), code="voucher.invalid", what="A voucher")
        except (OSError, TrainChainError):
            return None
        return found if (found.jobId, found.account.lower()) == (job, self.account.lower()) else None

    def ties(self, job: str) -> Ties | None:
        """What the promises of a job are bound to, by the newest of them."""
        newest: Receipt | Voucher | None = next(reversed(self.receipts(job)), None) or self.voucher(job)
        return Ties(newest.chain_id, newest.escrow, newest.hub) if newest else None

    def verdicts(self, job: str) -> Verdicts:
        """What the hub last said of verdicts on this wallet's work."""
        try:
            path = self.home / "verdicts" / f"{job}.json"
            return parse(Verdicts, path.read_bytes(), code="voucher.invalid", what="What is known of verdicts")
        except (OSError, TrainChainError):
            return Verdicts(forfeited=[])

    def vested(self, job: str) -> int:
        """What has vested by what lies here; another machine of the wallet may have added to it."""
        voucher = self.voucher(job)
        return max(vested(self.receipts(job), self.verdicts(job)), voucher.cumulative if voucher else 0)

    def earned(self, job: str) -> int:
        """What was accepted, by the receipts here, but for what is forfeited."""
        return _standing(self.receipts(job), self.verdicts(job))

    def _receipt(self, path: Path, job: str) -> Receipt | None:
        try:
            found = parse(Receipt, path.read_bytes(), code="receipt.invalid", what="A receipt")
        except (OSError, TrainChainError):
            return None
        ours = (found.jobId, found.lease, found.worker.lower()) == (job, path.stem, self.account.lower())
        return found if ours else None

    def _voucher_path(self, job: str) -> Path:
        return self.home / "vouchers" / f"{job}.json"


class Paybook(Papers):
    """The papers of one wallet at one hub, as its worker writes them. All workers of a home may write at once."""

    def __init__(self, home: Path, account: str, ties: Ties, signed: Signed) -> None:
        super().__init__(home, account)
        self.bound = ties
        self._signed = signed

    def here(self) -> list[str]:
        """Jobs of this hub of which anything lies here."""
        return [job for job in self.jobs() if self.ties(job) == self.bound]

    def keep(self, promised: Mapping[str, Any], answer: Mapping[str, Any], floor: int) -> Path:
        """Write down what came for an accepted contribution, the receipt and the voucher with it, and check both.

        `promised` are the Receipt's fields as they must be, all but the place; `floor` is what `vested` said before
        the contribution was sent. Raises `receipt.invalid` and `voucher.invalid`; what did not hold is kept.
        """
        job, lease = str(promised["jobId"]), str(promised["lease"])
        document = {name: value for name, value in answer.items() if name != "voucher"}
        path = self.home / "receipts" / job / f"{lease}.json"
        with self._alone():
            wrong = self._wrong_receipt(promised, document)
            if wrong is not None:
                path = path.parent / REFUSED / path.name
            write_private(path, _bytes(document))
            if wrong is not None:
                what = f"The hub's receipt for round {promised['round']}, shard {promised['shard']} {wrong}."
                raise TrainChainError("receipt.invalid", what, hint=f"Stop working for this hub, and keep {path}.")
            place = parse(Receipt, document, code="receipt.invalid", what="The receipt").place
            by_then = [receipt for receipt in self.receipts(job) if receipt.place <= place]
            self._keep_voucher(job, answer.get("voucher"), max(floor, vested(by_then, self.verdicts(job))))
        return path

    def keep_answer(self, job: str, answer: Mapping[str, Any], before: list[Receipt]) -> None:
        """Write down what a hub answered of a job's pay: the newest voucher, and why it is not more. `before` are the
        receipts that lay here when it was asked.

        Raises `voucher.invalid`; what did not hold is kept.
        """
        with self._alone():
            known = self.verdicts(job)
            told = {name: answer[name] for name in ("through", "waits", "forfeited") if name in answer}
            verdicts = parse(Verdicts, told, code="voucher.invalid", what=f"What the hub says of verdicts in job {job}")
            wrong = self._wrong_verdicts(job, before, known, verdicts)
            if wrong is not None:
                self._refuse("verdicts", job, told, f"What the hub says of verdicts in job {job} {wrong}.")
            ended = answer.get("ended") is True
            floor = _standing(before, verdicts) if ended else vested(before, verdicts)
            self._keep_voucher(job, answer.get("voucher"), max(floor, self.vested(job)))
            write_private(self.home / "verdicts" / f"{job}.json", verdicts.model_dump_json().encode())

    def keep_voucher(self, job: str, document: Any, floor: int) -> None:
        """Write down the newest voucher, where it promises more than the one here. `floor` is what it must promise.

        Raises `voucher.invalid`; what did not hold is kept.
        """
        with self._alone():
            self._keep_voucher(job, document, floor)

    def _wrong_receipt(self, promised: Mapping[str, Any], document: Mapping[str, Any]) -> str | None:
        try:
            receipt = parse(Receipt, dict(document), code="receipt.invalid", what="It")
        except TrainChainError as error:
            return f"cannot be read: {error.message}"
        if Ties(receipt.chain_id, receipt.escrow, receipt.hub) != self.bound:
            return "names another hub, chain or escrow"
        if any(
            _plain(value) != _plain(promised.get(name)) for name, value in receipt.fields().items() if name != "place"
        ):
            return "does not promise what it should"
        if not self._signed("Receipt", {**promised, "place": receipt.place}, receipt.signature):
            return "is not signed by the hub of the escrow"
        others = [one for one in self.receipts(receipt.jobId) if one.lease != receipt.lease]
        if any(one.place == receipt.place for one in others):
            return f"has the place {receipt.place} in the queue that another one has"
        return None

    def _keep_voucher(self, job: str, document: Any, floor: int) -> None:
        if document is None and not floor:
            return
        kept = self.voucher(job)
        wrong, amount = self._wrong_voucher(job, document, floor)
        if wrong is not None:
            self._refuse("vouchers", job, document, f"The hub's voucher for job {job} {wrong}.")
        if kept is None or amount > kept.cumulative:
            write_private(self._voucher_path(job), _bytes(document))

    def _refuse(self, folder: str, job: str, document: Any, what: str) -> NoReturn:
        path = self.home / folder / REFUSED / f"{job}.json"
        write_private(path, _bytes(document))
        raise TrainChainError("voucher.invalid", what, hint=f"Stop working for this hub, and keep {path}.")

    def _wrong_verdicts(self, job: str, before: list[Receipt], known: Verdicts, told: Verdicts) -> str | None:
        """What cannot be true of it: nothing that had vested is forfeited, and only what was drawn is judged."""
        newest = max((receipt.place for receipt in before), default=0)
        if told.through < newest:
            return f"is about {told.through} places; {newest} were accepted"
        sure = _reach(before, known)
        by_lease = {receipt.lease: receipt for receipt in before}
        for lost in told.forfeited:
            if lost not in known.forfeited and lost.first <= sure:
                return f"forfeits the place {lost.first}, which had vested"
            judged = by_lease.get(lost.lease)
            if judged is not None and (judged.draw is None or not lost.first <= judged.place <= lost.last):
                return f"rejects round {judged.round}, shard {judged.shard}, of which no audit was drawn"
        if [one for one in known.forfeited if one not in told.forfeited]:
            return "takes back what it said was forfeited"
        return None

    def _wrong_voucher(self, job: str, document: Any, floor: int) -> tuple[str | None, int]:
        """What is wrong with it, and what it promises."""
        if document is None:
            return f"is missing, though {floor} units have vested", 0
        try:
            voucher = parse(Voucher, document, code="voucher.invalid", what="It")
        except TrainChainError as error:
            return f"cannot be read: {error.message}", 0
        if (voucher.jobId, voucher.account.lower()) != (job, self.account.lower()):
            return "is for another job or wallet", 0
        if Ties(voucher.chain_id, voucher.escrow, voucher.hub) != self.bound:
            return "names another hub, chain or escrow", 0
        if not self._signed("Voucher", voucher.fields(), voucher.signature):
            return "is not signed by the hub of the escrow", 0
        if voucher.cumulative < floor:
            return f"promises {voucher.cumulative} units; {floor} have vested", 0
        return None, voucher.cumulative

    def _alone(self) -> FileLock:
        """Other workers of this home, in this process or another, may have a newer voucher in hand."""
        return FileLock(private_folder(self.home / "vouchers") / ".lock", mode=0o600)


def vested(receipts: Iterable[Receipt], verdicts: Verdicts) -> int:
    """What has vested of these shards of one job, as the hub counts them (core/rewards.py), by what is known here."""
    found = list(receipts)
    reach = _reach(found, verdicts)
    return _standing((receipt for receipt in found if receipt.place <= reach), verdicts)


def _standing(receipts: Iterable[Receipt], verdicts: Verdicts) -> int:
    return sum(receipt.amount for receipt in receipts if verdicts.lost(receipt.place) is None)


def _reach(receipts: list[Receipt], verdicts: Verdicts) -> int:
    """Through which place everything that is not forfeited has vested, at the least. Of what came after the newest
    word on verdicts every shard that was drawn may be without one, and every shard that is not here may be drawn."""
    newest = max((receipt.place for receipt in receipts), default=0)
    plain = {receipt.place for receipt in receipts if receipt.draw is None}
    first = next((place for place in range(verdicts.through + 1, newest + 1) if place not in plain), newest + 1)
    if verdicts.waits is not None:
        first = min(first, verdicts.waits)
    lost = max((one.last for one in verdicts.forfeited), default=0)
    return max(lost, first - 1 - VESTING)


def _plain(value: Any) -> Any:
    """An address in any case names the same account."""
    return value.lower() if isinstance(value, str) else value


def _bytes(document: Any) -> bytes:
    return json.dumps(document, indent=1, sort_keys=True).encode()
