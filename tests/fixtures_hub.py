"""A real hub on loopback over an embedded chain: time stands still and its ticks are called by hand. No torch."""

import secrets
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvicorn
from sqlalchemy import select

from tests.fixtures_merge import PLAIN_MERGE, UNCHECKED
from trainchain.chain.devnet.node import Devnet
from trainchain.chain.devnet.rpc import Rpc
from trainchain.chain.eip712 import Domain
from trainchain.chain.escrow import ChainClient
from trainchain.chain.provider import EmbeddedProvider
from trainchain.chain.records import JobParams
from trainchain.chain.signin import SignIn, sign_in
from trainchain.chain.wallet import Wallet
from trainchain.cli.bridge import HubChain
from trainchain.cli.hub_process import _bind as bind
from trainchain.core import seal
from trainchain.core.adapter import Adapter, adapter_bytes, read_adapter
from trainchain.core.client import HubClient
from trainchain.core.digests import sha256
from trainchain.core.hub import cashier, rounds, schema
from trainchain.core.hub.api import create_app
from trainchain.core.hub.service import Hub
from trainchain.core.hub.store import Store
from trainchain.core.models import (
    Access,
    Base,
    Counts,
    DataSet,
    FileRef,
    HeldOut,
    Lora,
    Pay,
    ResolvedRecipe,
    Sealed,
    Training,
)
from trainchain.core.objects import ObjectStore
from trainchain.core.rewards import job_price, round_cap
from trainchain.core.seal import ExchangeKey
from trainchain.core.settings import Settings
from trainchain.core.sharding import piece, spare_shards

COIN = 10**18
LEARNING_RATE = 1e-2
STEPS = 4
REACH = 3 * LEARNING_RATE * STEPS
SHAPES = {
    f"base_model.model.{module}.lora_{side}.weight": shape
    for module in ("layers.0.q_proj", "layers.0.up_proj")
    for side, shape in (("A", (2, 6)), ("B", (5, 2)))
}


class Clock:
    """What hub and chain go by; it moves only when a test says so."""

    def __init__(self) -> None:
        self.at = 1_800_000_000.0

    def __call__(self) -> float:
        return self.at

    def forward(self, seconds: float) -> None:
        self.at += seconds


def no_sleep(seconds: float) -> None:
    raise AssertionError("nothing here has to be waited for")


def new_wallet() -> Wallet:
    return Wallet(secrets.token_bytes(32))


def numbers(seed: int, scale: float = REACH / 4) -> Adapter:
    """Tensors of the adapter's shapes, none further than `scale` from zero."""
    random = np.random.default_rng(seed)
    return {name: random.uniform(-scale, scale, shape).astype(np.float32) for name, shape in SHAPES.items()}


INITIAL = adapter_bytes(
    {name: tensor if "lora_A" in name else np.zeros_like(tensor) for name, tensor in numbers(0, 1.0).items()}
)


def ref(name: str, data: bytes) -> FileRef:
    return FileRef(name=name, sha256=sha256(data), size=len(data))


def recipe(
    files: Mapping[str, bytes],
    *,
    rounds: int = 2,
    shards: int = 2,
    per_million: int = 2_500_000_000_000_000_123,
    budget: int | None = None,
    pay_deadline: int = 7200,
    activation_delay: int = 0,
    **changes: Any,
) -> ResolvedRecipe:
    """A job's resolved recipe by hand; every shard has its own count, so that no two pay the same."""
    spares = spare_shards(changes.get("merge", PLAIN_MERGE).spares, shards)
    counts = [
        [
            Counts(rows=9, tokens=1001 + 7 * piece(r, s, shards=shards, rounds=rounds, spares=spares), supervised=500)
            for s in range(shards + spares)
        ]
        for r in range(1, rounds + 1)
    ]
    held_out = None
    if "held-out.jsonl" in files:
        dataset = DataSet(source=None, file=ref("held-out.jsonl", files["held-out.jsonl"]), format="text", rows=3)
        held_out = HeldOut(dataset=dataset, rows=3, tokens=40, supervised=30)
    values: dict[str, Any] = {
        "trainchain": 1,
        "name": "tiny",
        "base_model": Base(source=None, license=None, files=[ref("model.safetensors", files["model.safetensors"])]),
        "datasets": [DataSet(source=None, file=ref("train-0.jsonl", files["train-0.jsonl"]), format="text", rows=9)],
        "held_out": held_out,
        "access": Access(workers="anyone", keys=None),
        "sealed": None,
        "chat_template": None,
        "hub_model_id": None,
        "lora": Lora(r=2, alpha=4, targets=["layers.0.q_proj"], initial=ref("initial.safetensors", INITIAL)),
        "training": Training(
            sequence_len=64,
            batch_size=4,
            micro_batch_size=2,
            learning_rate=LEARNING_RATE,
            lr_scheduler="constant",
            warmup_steps=1,
            shard_warmup_steps=0,
            max_grad_norm=1.0,
            weight_decay=0.0,
            adam_beta1=0.9,
            adam_beta2=0.999,
            adam_epsilon=1e-8,
            precision="fp32",
            quantization="none",
            attention="sdpa",
            adapter_path="fused",
            segment_steps=1,
            seed=0,
        ),
        "rounds": rounds,
        "shards": shards,
        "steps": STEPS,
        "round_deadline": 600,
        "quorum": 0.5,
        "merge": PLAIN_MERGE,
        "check": UNCHECKED,
        "pay": Pay(
            token="TRAIN",
            per_million_tokens=per_million,
            budget=1,
            deadline=pay_deadline,
            grace=600,
            activation_delay=activation_delay,
        ),
        "samples": [],
        "sample_tokens": 64,
        "counts": counts,
    }
    made = ResolvedRecipe(**{**values, **changes})
    pay = made.pay.model_copy(update={"budget": job_price(made) * 2 if budget is None else budget})
    return made.model_copy(update={"pay": pay})


@dataclass
class SealedFiles:
    """What an owner has sealed: the ciphertexts by their digests, and the identity that opens each."""

    refs: Sealed
    ciphertexts: dict[str, bytes]
    identities: dict[str, str]


def seal_files(*, rounds: int, shards: int, held_out: bool, base: bool) -> SealedFiles:
    """Tiny files that nobody else has, sealed as a private job's are."""
    ciphertexts, identities = {}, {}

    def one(name: str) -> FileRef:
        identity = seal.new_identity()
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / name
            seal.seal(f"{name} {secrets.token_hex(8)}".encode(), target, identity)
            data = target.read_bytes()
        made = ref(name, data)
        ciphertexts[made.sha256], identities[made.sha256] = data, identity
        return made

    refs = Sealed(
        blocks=[[one(f"block-{r + 1}-{s}.age") for s in range(shards)] for r in range(rounds)],
        held_out=one("held-out.age") if held_out else None,
        base=[one("config.json"), one("model.safetensors")] if base else [],
    )
    return SealedFiles(refs, ciphertexts, identities)


def sealed_recipe(files: SealedFiles, *, workers: Any = "anyone", keys: str = "hub", **options: Any) -> ResolvedRecipe:
    """A private job's resolved recipe by hand: `workers` as `Access` has them."""
    rounds, shards = len(files.refs.blocks), options.pop("shards", len(files.refs.blocks[0]))
    hidden = DataSet(source=None, file=None, format="text", rows=9)
    distant = FileRef(name="model.safetensors", sha256="ab" * 32, size=9, path="model.safetensors")
    source = "hf://org/name@" + "12" * 20
    base = Base(source=None, license=None, files=[])
    values: dict[str, Any] = {
        "base_model": base if files.refs.base else Base(source=source, license="mit", files=[distant]),
        "datasets": [hidden],
        "held_out": HeldOut(dataset=hidden, rows=3, tokens=40, supervised=30) if files.refs.held_out else None,
        "access": Access(workers=workers, keys=keys),
        "sealed": files.refs,
    }
    return recipe(job_files(), rounds=rounds, shards=shards, **{**values, **options})


@dataclass
class Town:
    """One hub, its chain, and everybody who deals with it."""

    root: Path
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        node = Devnet(self.root / "chain" / "town.sqlite", clock=self.clock)
        self.chain = ChainClient(EmbeddedProvider(node), sleep=no_sleep)
        self.rich = node.faucet()
        self.token = self.chain.deploy(self.rich).token
        self.keys, self.evaluator_keys = new_wallet(), new_wallet()
        self.chain.transfer_gas(self.rich, self.keys.address, COIN)
        self.port = HubChain(self.chain, self.keys, self.token, "/chain", self.rich)
        self.port._rpc.node.close()
        self._public = Devnet(node.path, clock=self.clock)  # the door for everybody goes by the same clock
        self.port._rpc = Rpc(self._public, public=True)
        self.http = httpx.Client(timeout=60, verify=False, trust_env=False)
        self.start()
        self.owner = self.person()
        self.give(self.owner.address, 10**6 * COIN)

    def give(self, address: str, tokens: int) -> None:
        """What an account needs to open a job of that size."""
        self.chain.transfer_gas(self.rich, address, 100 * COIN)
        self.chain.transfer_token(self.rich, self.token, address, tokens)

    def start(self) -> None:
        """Start the hub's process, as it were: everything but its folder is new."""
        self.hub = Hub(
            Store(self.root / "hub.sqlite"),
            ObjectStore(self.root / "objects"),
            self.port,
            clock=self.clock,
            evaluators=frozenset({self.evaluator_keys.address}),
            exchange=ExchangeKey.load_or_create(self.root / "exchange-key"),
        )
        bound = bind("127.0.0.1:0")
        self.host = f"127.0.0.1:{bound.getsockname()[1]}"
        self.url = f"http://{self.host}"
        config = uvicorn.Config(create_app(self.hub), log_config=None, access_log=False, lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [bound]}, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self.hub.bell.close()
        self._server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()
        self.hub.store.close()

    def close(self) -> None:
        self.http.close()
        self.stop()
        self._public.close()
        self.chain.close()

    def ask(self, path: str) -> Any:
        """What anybody is told."""
        return self.http.get(self.url + path).raise_for_status().json()

    def tick(self) -> None:
        """Let the hub do all that is due, as its two threads would."""
        for _ in range(100):
            if not rounds.tick(self.hub) and not cashier.tick(self.hub):
                return
        raise AssertionError("the hub never comes to rest")

    def person(self, wallet: Wallet | None = None) -> "Person":
        return Person(self, wallet or new_wallet())

    def rows(self, table: Any, **key: Any) -> list[dict[str, Any]]:
        query = select(table).where(*(table.c[name] == value for name, value in key.items()))
        with self.hub.store.read() as db:
            return [dict(row) for row in db.execute(query.order_by(*table.primary_key)).mappings()]

    def row(self, table: Any, **key: Any) -> dict[str, Any]:
        (found,) = self.rows(table, **key)
        return found

    def publish(
        self,
        files: Mapping[str, bytes] | None = None,
        *,
        owner: "Person | None" = None,
        escrow: int | None = None,
        held_out: bool = False,
        upload: bool = True,
        **options: Any,
    ) -> "Job":
        """Publish a job over HTTP and fund it in the real escrow. `escrow` 0 leaves it without one."""
        files = files if files is not None else job_files(held_out=held_out)
        return self.open(recipe(files, **options), files, owner or self.owner, upload=upload, escrow=escrow)

    def publish_sealed(
        self,
        *,
        owner: "Person | None" = None,
        escrow: int | None = None,
        rounds: int = 2,
        shards: int = 2,
        held_out: bool = False,
        base: bool = True,
        **options: Any,
    ) -> "Job":
        """Seal, publish and fund a private job: every key wrapped for the hub."""
        owner = owner or self.owner
        sealed = seal_files(rounds=rounds, shards=shards, held_out=held_out, base=base)
        return self.open(sealed_recipe(sealed, **options), {}, owner, escrow=escrow, sealed=sealed)

    def wrapped(self, job_id: str, identities: Mapping[str, str], **changes: Any) -> dict[str, str]:
        """Each identity as an owner wraps it for this hub."""
        values = {"chain": self.chain.chain_id, "hub": self.keys.address, "public": self.hub.exchange.public, **changes}
        return {
            digest: seal.wrap(identity, values["public"], seal.for_hub(values["chain"], job_id, digest, values["hub"]))
            for digest, identity in identities.items()
        }

    def open(
        self,
        made: ResolvedRecipe,
        files: Mapping[str, bytes],
        owner: "Person",
        *,
        upload: bool = True,
        escrow: int | None = None,
        sealed: SealedFiles | None = None,
    ) -> "Job":
        """Publish a recipe over HTTP, bring its files, and fund it."""
        salt = "0x" + secrets.token_hex(32)
        document: dict[str, Any] = {"recipe": made.model_dump(mode="json"), "salt": salt}
        if sealed is not None:
            document["keys"] = self.wrapped(self.chain.job_id(owner.address, salt), sealed.identities)
        answer = owner.post("/v1/jobs", document).raise_for_status().json()
        job = Job(self, owner, made, answer["job"], salt, dict(files), sealed.identities if sealed else {})
        if upload:
            bytes_of = {sha256(data): data for data in [*files.values(), INITIAL]}
            bytes_of |= sealed.ciphertexts if sealed else {}
            for digest in answer["missing"]:
                owner.put(f"/v1/jobs/{job.id}/objects/{digest}", bytes_of[digest]).raise_for_status()
        if escrow != 0:
            job.create_escrow(made.pay.budget if escrow is None else escrow)
            owner.post(f"/v1/jobs/{job.id}/fund").raise_for_status()
        self.tick()
        return job


def job_files(*, held_out: bool = False) -> dict[str, bytes]:
    """Files that nobody else has."""
    names = ["model.safetensors", "train-0.jsonl", *(["held-out.jsonl"] if held_out else [])]
    return {name: f"{name} {secrets.token_hex(8)}".encode() for name in names}


@dataclass
class Job:
    town: Town
    owner: "Person"
    recipe: ResolvedRecipe
    id: str
    salt: str
    files: dict[str, bytes]
    identities: dict[str, str] = field(default_factory=dict)
    """Of a sealed job: what opens each of its sealed files."""

    @property
    def sealed(self) -> Sealed:
        assert self.recipe.sealed is not None
        return self.recipe.sealed

    def create_escrow(self, amount: int, **changes: Any) -> None:
        town, pay = self.town, self.recipe.pay
        if town.chain.token_balance(town.token, self.owner.address) < amount:
            town.give(self.owner.address, amount)
        values: dict[str, Any] = {
            "token": town.token,
            "hub": town.keys.address,
            "deadline": int(town.clock()) + pay.deadline,
            "grace": pay.grace,
            "activation_delay": pay.activation_delay,
            "round_cap": round_cap(self.recipe),
            "spec_hash": "0x" + self.recipe.spec_hash,
            "salt": self.salt,
        }
        town.chain.create_job(self.owner.wallet, JobParams(**{**values, **changes}), amount)

    @property
    def row(self) -> dict[str, Any]:
        return self.town.row(schema.jobs, id=self.id)

    @property
    def state(self) -> str:
        return str(self.row["state"])

    def round(self, number: int) -> dict[str, Any]:
        return self.town.row(schema.rounds, job=self.id, round=number)

    def shards(self, number: int) -> list[str]:
        return [row["state"] for row in self.town.rows(schema.shards, job=self.id, round=number)]

    def view(self) -> dict[str, Any]:
        return self.town.ask(f"/v1/jobs/{self.id}")


class Person:
    """A wallet that talks to the hub in plain HTTP, so that it can also say what no client of ours would."""

    def __init__(self, town: Town, wallet: Wallet) -> None:
        self.town = town
        self.wallet = wallet
        self.address = wallet.address
        self.exchange = seal.ExchangeKey(secrets.token_bytes(32))
        self._session = ("", 0.0)

    @property
    def headers(self) -> dict[str, str]:
        """Of a request in this wallet's session; it signs in again where time has gone by."""
        if self._session[1] < self.town.clock():
            answer = self.post_sign_in(self.sign_in_fields()).raise_for_status().json()
            self._session = (answer["token"], answer["expires"])
        return {"authorization": f"Bearer {self._session[0]}"}

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        headers = {**self.headers, **options.pop("headers", {})}
        return self.town.http.request(method, self.town.url + path, headers=headers, **options)

    def get(self, path: str) -> httpx.Response:
        return self.request("GET", path)

    def post(self, path: str, document: Any = None) -> httpx.Response:
        return self.request("POST", path, json={} if document is None else document)

    def put(self, path: str, data: bytes) -> httpx.Response:
        return self.request("PUT", path, content=data)

    def sign_in_fields(self, **changes: Any) -> dict[str, Any]:
        """What this wallet would sign to sign in now, over a nonce of the hub's."""
        now = datetime.fromtimestamp(self.town.clock(), UTC)
        nonce = self.town.http.post(f"{self.town.url}/v1/session/nonce").json()["nonce"]
        fields = {
            "domain": self.town.host,
            "address": self.address,
            "uri": self.town.url,
            "chain_id": self.town.chain.chain_id,
            "nonce": nonce,
            "issued_at": now.isoformat(),
            "expiration_time": (now + timedelta(days=1)).isoformat(),
        }
        return {**fields, **changes}

    def post_sign_in(self, fields: dict[str, Any], *, by: Wallet | None = None) -> httpx.Response:
        signature = sign_in(SignIn(**fields), by or self.wallet)
        return self.town.http.post(f"{self.town.url}/v1/session", json={"fields": fields, "signature": signature})

    def client(self) -> HubClient:
        """The client that commands use, signed in as this wallet."""
        return HubClient(
            self.town.url,
            address=self.address,
            sign_in=lambda fields: sign_in(SignIn(**fields), self.wallet),
            sleep=no_sleep,
            now=lambda: datetime.fromtimestamp(self.town.clock(), UTC),
        )

    def settings(self, home: Path) -> Settings:
        return Settings(home, self.town.url)

    def exchange_request(
        self, *, exchange: seal.ExchangeKey | None = None, by: Wallet | None = None, account: str | None = None
    ) -> dict[str, str]:
        """This worker's exchange key, signed by its wallet."""
        public = (exchange or self.exchange).public
        domain = Domain(self.town.chain.chain_id, self.town.chain.escrow)
        message = {"account": account or self.address, "publicKey": "0x" + public}
        return {"public_key": public, "signature": (by or self.wallet).sign_typed(domain, "ExchangeKey", message)}

    def ask_keys(self, lease: Mapping[str, Any], document: Any = None) -> httpx.Response:
        return self.post(f"/v1/leases/{lease['lease']}/keys", document or self.exchange_request())

    def opened(self, lease: Mapping[str, Any], answer: httpx.Response) -> dict[str, str]:
        """The identities that an answer gives this worker for this lease, by the digest of what they open."""
        chain, place = self.town.chain.chain_id, (lease["job"], lease["round"], lease["shard"], lease["lease"])
        return {
            key["digest"]: self.exchange.unwrap(
                key["wrapped"], seal.for_lease(chain, *place, key["digest"], self.address)
            )
            for key in answer.raise_for_status().json()["keys"]
        }

    def lease(self, job: Job | None = None) -> dict[str, Any] | None:
        answer = self.post("/v1/leases", {"job": job.id} if job else {}).raise_for_status()
        return None if answer.status_code == 204 else answer.json()

    def must_lease(self, job: Job | None = None) -> dict[str, Any]:
        found = self.lease(job)
        assert found is not None, "the hub has no work"
        return found

    def message(self, lease: Mapping[str, Any], delta: bytes, /, **changes: Any) -> dict[str, Any]:
        return {
            "jobId": lease["job"],
            "round": lease["round"],
            "shard": lease["shard"],
            "lease": lease["lease"],
            "worker": self.address,
            "startHash": "0x" + lease["start"],
            "deltaHash": "0x" + sha256(delta),
            "stateRoot": "0x" + "5a" * 32,
            "encoding": "fp32",
            "numericClass": "test",
            **changes,
        }

    def signed(self, message: Mapping[str, Any], *, by: Wallet | None = None) -> dict[str, Any]:
        domain = Domain(self.town.chain.chain_id, self.town.chain.escrow)
        signature = (by or self.wallet).sign_typed(domain, "Contribution", dict(message))
        told = {"losses": [2.5, 1.5], "seconds": 1.0, "micro_tokens": [128] * STEPS}
        return {"contribution": dict(message), "signature": signature, **told}

    def upload(self, lease: Mapping[str, Any], delta: bytes) -> httpx.Response:
        return self.put(f"/v1/leases/{lease['lease']}/objects/{sha256(delta)}", delta)

    def hand_in(self, lease: Mapping[str, Any], document: Any) -> httpx.Response:
        return self.post(f"/v1/leases/{lease['lease']}/contribution", document)

    def contribute(
        self, lease: Mapping[str, Any], delta: bytes | Adapter | int | None = None, /, **changes: Any
    ) -> httpx.Response:
        """Upload a delta (by default one that nobody else has) and hand in a signed contribution of it."""
        if delta is None or isinstance(delta, int):
            delta = numbers(delta if isinstance(delta, int) else secrets.randbits(63))
        data = delta if isinstance(delta, bytes) else adapter_bytes(delta)
        uploaded = self.upload(lease, data)
        if uploaded.status_code >= 400:
            return uploaded
        return self.hand_in(lease, self.signed(self.message(lease, data, **changes)))

    def work(self, job: Job) -> dict[str, Any]:
        """Lease one shard, contribute to it honestly, return the receipt."""
        answer = self.contribute(self.must_lease(job))
        assert answer.status_code == 200, answer.text
        receipt: dict[str, Any] = answer.json()
        return receipt

    def fetch(self, digest: str) -> bytes:
        answer = self.get(f"/v1/objects/{digest}").raise_for_status()
        assert sha256(answer.content) == digest
        return answer.content

    def fetch_adapter(self, digest: str) -> Adapter:
        return read_adapter(self.fetch(digest))
