"""A finished job by hand: its resolved recipe, and what its hub tells of it."""

from typing import Any

from tests.fixtures_hub import recipe
from trainchain.core.digests import sha256
from trainchain.core.history import Chain, History
from trainchain.core.models import Base, DataSet, FileRef, HeldOut, Lora, ResolvedRecipe, Sealed, parse

COMMIT = "12fd25f77366fa6b3b4b768ec3050bf629380bac"
DATA_COMMIT = "5ff88d7d5d9f25d8b4b8d2f0d3f1f8f7f0d0c0b0"
JOB = "0x" + "7f" * 32
OWNER, HUB, ESCROW = ("0x" + digit * 40 for digit in "123")
WORKERS = ["0x" + "a" * 40, "0x" + "B" * 40]
CHAIN = Chain(chain_id=8453, escrow=ESCROW, hub=HUB, embedded=False)
HUB_BASE = Base(
    source=f"hf://HuggingFaceTB/SmolLM2-135M@{COMMIT}",
    license="apache-2.0",
    files=[
        FileRef(name=name, sha256=sha256(name.encode()), size=100, path=name)
        for name in ("config.json", "model.safetensors", "tokenizer.json")
    ],
)
HUB_DATA = DataSet(
    source=f"hf://datasets/acme/tickets@{DATA_COMMIT}",
    file=FileRef(name="train-0.parquet", sha256=sha256(b"rows"), size=4, path="data/train-00000.parquet"),
    format="chat_template",
    rows=1200,
)
OWN_DATA = DataSet(
    source=None, file=FileRef(name="train-1.jsonl", sha256=sha256(b"mine"), size=4), format="text", rows=1
)


def a_job(**changes: Any) -> ResolvedRecipe:
    """A public job on a base and data of Hugging Face, and a file of the owner's own."""
    files = {"model.safetensors": b"m", "train-0.jsonl": b"t", "held-out.jsonl": b"h"}
    values: dict[str, Any] = {
        "name": "support-bot",
        "base_model": HUB_BASE,
        "datasets": [HUB_DATA, OWN_DATA],
        "lora": Lora(
            r=12,
            alpha=24,
            targets=[
                f"model.layers.{layer}.{name}" for layer in range(2) for name in ("self_attn.q_proj", "mlp.up_proj")
            ],
            initial=FileRef(name="initial.safetensors", sha256="0" * 64, size=0),
        ),
        "chat_template": None,
        "hub_model_id": "acme/support-bot-lora",
    }
    return recipe(files, **{**values, **changes})


def a_private_job(**changes: Any) -> ResolvedRecipe:
    """The same with its base and its rows sealed."""
    plain = a_job()
    assert plain.held_out is not None
    secret = FileRef(name="block.age", sha256=sha256(b"ciphertext"), size=9)
    hidden = OWN_DATA.model_copy(update={"file": None})
    held_out = HeldOut(dataset=hidden, rows=3, tokens=40, supervised=30)
    return a_job(
        base_model=Base(source=None, license=None, files=[]),
        datasets=[hidden],
        held_out=held_out,
        access=plain.access.model_copy(update={"keys": "owner", "workers": WORKERS}),
        sealed=Sealed(blocks=[[secret, secret], [secret, secret]], held_out=secret, base=[secret]),
        **changes,
    )


def told(job: ResolvedRecipe, **changes: Any) -> History:
    """The view of its hub once all is settled: the second worker trained one shard, the first the rest."""
    adapters = [sha256(f"adapter {number}".encode()) for number in range(job.rounds + 1)]
    rounds = [
        {
            "round": number,
            "state": "merged",
            "start": adapters[number - 1],
            "adapter": adapters[number],
            "merge_error": 0.01,
            "opened": 1.0,
            "shards": [
                {
                    "shard": shard,
                    "state": "accepted",
                    "worker": WORKERS[shard % 2 if number == 1 else 0],
                    "tokens": 99,
                    "merged_in": number,
                }
                for shard in range(job.shards)
            ],
        }
        for number in range(1, job.rounds + 1)
    ]
    view = {
        "job": JOB,
        "owner": OWNER,
        "state": "settled",
        "spec_hash": job.spec_hash,
        "rounds_done": rounds,
        "evaluations": [
            {"round": number, "state": "done", "loss": 3.0 - 0.5 * number, "samples": []}
            for number in range(job.rounds + 1)
        ],
        "settlements": [
            {
                "round": number,
                "root": "0x" + sha256(f"root {number}".encode()),
                "total": str(number * 10**18),
                "leaves": sha256(f"leaves {number}".encode()),
                "tx": "0x" + sha256(f"tx {number}".encode()),
                "at": 5.0,
            }
            for number in range(1, job.rounds + 1)
        ],
        "last_event": 12,
        **changes,
    }
    return parse(History, view, code="hub.not_a_hub", what="The view")
