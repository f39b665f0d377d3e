"""The model card says what is so of the job, and nothing that is not."""

from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from tests.fixtures_card import CHAIN, COMMIT, HUB_BASE, HUB_DATA, WORKERS, a_job, a_private_job, told
from tests.fixtures_merge import PLAIN_MERGE, UNCHECKED
from trainchain.core.card import card, front_matter, hub_base
from trainchain.core.errors import TrainChainError
from trainchain.core.evidence import REJECTS
from trainchain.core.history import History, ToldVerdict, read_history
from trainchain.core.models import Base, ResolvedRecipe
from trainchain.core.money import show
from trainchain.core.rewards import shard_reward

GOLDEN = Path(__file__).parents[1] / "golden"


def front(text: str) -> dict[str, object]:
    data = ModelCard(text).data.to_dict()
    assert isinstance(data, dict)
    return data


@pytest.mark.parametrize(("name", "folded"), [("card.md", None), ("card-merged.md", "bf16")])
def test_the_card_is_the_one_that_was_read_and_found_true(name: str, folded: str | None) -> None:
    """Read a difference as a person would, then write the file anew."""
    job = a_job()

    text = card(job, told(job), CHAIN, 2, where="acme/support-bot-lora", folded=folded)

    assert text.replace(job.spec_hash, "SPEC-HASH") == (GOLDEN / name).read_text(encoding="utf-8")


def test_the_front_matter_is_what_hugging_face_reads() -> None:
    job = a_job()

    found = front(card(job, told(job), CHAIN, 2))

    assert found == {
        "base_model": "HuggingFaceTB/SmolLM2-135M",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "datasets": ["acme/tickets"],
        "tags": ["base_model:adapter:HuggingFaceTB/SmolLM2-135M", "lora", "transformers", "trainchain"],
    }
    merged = front(card(job, told(job), CHAIN, 2, folded="fp32"))
    assert (merged["base_model_relation"], merged["library_name"]) == ("finetune", "transformers")
    assert merged["tags"] == ["base_model:finetune:HuggingFaceTB/SmolLM2-135M", "transformers", "trainchain"]


def test_what_is_not_known_is_left_out() -> None:
    job = a_job(base_model=Base(source=None, license=None, files=HUB_BASE.files), datasets=[a_job().datasets[1]])

    text = card(job, told(job, evaluations=[], settlements=[]), CHAIN, 2)

    assert set(front(text)) == {"library_name", "pipeline_tag", "tags"}
    assert "The base's licence applies; it is not named by its source." in text
    assert "not settled on chain yet" in text
    assert "not measured" in text
    assert "More Information" not in text
    assert 'from_pretrained("BASE")' in text
    assert "`model.safetensors` `" + HUB_BASE.files[1].sha256 in text


@pytest.mark.parametrize(
    ("license_", "source", "known"),
    [
        ("llama3.2", HUB_BASE.source, True),
        ("apache-2.0", None, True),
        ("apache-2.0", "azureml://registries/azureml/models/phi/versions/3", True),
        ("custom", "azureml://registries/azureml/models/phi/versions/3", False),
        ("Apache License 2.0", HUB_BASE.source, False),
    ],
)
def test_a_licence_is_in_the_front_matter_where_its_name_means_the_same_there(
    license_: str, source: str | None, known: bool
) -> None:
    job = a_job(base_model=Base(source=source, license=license_, files=HUB_BASE.files))

    text = card(job, told(job), CHAIN, 2)

    assert front(text).get("license") == (license_ if known else None)
    assert f"The base's: `{license_}`, as its source names it." in text


def test_a_licence_of_the_base_s_own_is_named_as_the_hub_takes_it() -> None:
    job = a_job(base_model=Base(source=HUB_BASE.source, license="other (qwen-research)", files=HUB_BASE.files))

    said = front(card(job, told(job), CHAIN, 2))

    assert (said["license"], said["license_name"]) == ("other", "qwen-research")


def test_a_folded_model_s_card_counts_on_no_file_that_is_not_beside_it() -> None:
    job = a_job()

    adapter, folded = card(job, told(job), CHAIN, 2), card(job, told(job), CHAIN, 2, folded="bf16")

    assert "Both are in `trainchain/contributions.json` beside the adapter." in adapter
    assert "contributions.json" not in folded
    assert "Both stand in the evidence that `trainchain push` puts beside the adapter." in folded


def test_a_private_job_s_card_names_neither_base_nor_rows() -> None:
    job = a_private_job()

    text = card(job, told(job), CHAIN, 2)

    assert "datasets" not in front(text)
    assert "A private model of the job's owner; it is not named." in text
    assert "Private and not named here." in text
    sealed = job.sealed
    assert sealed is not None
    assert not any(ref.sha256 in text for ref in sealed.files())
    assert "gives to its owner and its workers under" in text


def test_a_round_s_card_counts_that_round_and_those_before() -> None:
    job = a_job()
    history = told(job)
    tokens = [sum(counts.tokens for counts in row) for row in job.counts]

    first, last = (card(job, history, CHAIN, number) for number in (1, 2))

    assert f"on {tokens[0]:,} tokens, in 1 round" in first
    assert "The job has 2 rounds; this is the adapter of round 1." in first
    assert f"on {sum(tokens):,} tokens, in 2 rounds" in last
    assert f"| `{WORKERS[1]}` | 1 | {job.counts[0][1].tokens:,} |" in last
    assert "Held-out loss: 3.0000 before, 2.5000 after." in first
    assert history.settlements[1].tx in last
    assert history.settlements[1].tx not in first


def test_what_came_late_counts_where_it_was_merged_and_what_is_spare_is_said() -> None:
    job = a_job(shards=3, merge=PLAIN_MERGE.model_copy(update={"spares": 0.4}))
    rounds = [row.model_dump() for row in told(job).rounds_done]
    rounds[0]["shards"][0]["merged_in"] = 2
    rounds[1]["shards"][1] |= {"shard": 3}
    rounds[1]["shards"][2]["merged_in"] = None
    history = told(job).model_copy(update={"rounds_done": told(job, rounds_done=rounds).rounds_done})

    first, last = (card(job, history, CHAIN, number) for number in (1, 2))

    assert "| Shards accepted and merged | 2 of 3 |" in first
    assert "| Shards accepted and merged | 4 of 6, and 1 spare shard; 1 came one round late and had half " in last
    merged = [(1, 0), (1, 1), (1, 2), (2, 0), (2, 3)]
    assert f"on {sum(job.counts[number - 1][shard].tokens for number, shard in merged):,} tokens" in last


def test_a_settlement_that_covers_a_round_later_is_named() -> None:
    job = a_job()
    history = told(job)
    only_last = history.model_copy(update={"settlements": history.settlements[1:]})

    assert [row.round for row in only_last.settled(1)] == [2]
    assert history.settlements[1].tx in card(job, only_last, CHAIN, 1)


def test_a_job_that_was_stopped_says_so() -> None:
    job = a_job(rounds=2)
    history = told(job, state="cancelled")

    assert "The job was to have 2 rounds; it is cancelled." in card(job, history, CHAIN, 1)


def test_a_base_in_a_folder_of_its_repository_is_loaded_from_there() -> None:
    files = [ref.model_copy(update={"path": f"fp16/{ref.name}"}) for ref in HUB_BASE.files]
    job = a_job(base_model=HUB_BASE.model_copy(update={"files": files}))

    found = hub_base(job)
    text = card(job, told(job), CHAIN, 2)

    assert found is not None
    assert (found.id, found.commit, found.folder) == ("HuggingFaceTB/SmolLM2-135M", COMMIT, "fp16")
    assert f'revision="{COMMIT}", subfolder="fp16"' in text
    assert "vllm serve BASE " in text


def test_a_card_is_the_same_whenever_it_is_written() -> None:
    job = a_job()
    later = told(job, last_event=99, money={"funded": "1"})

    assert card(job, told(job), CHAIN, 2) == card(job, later, CHAIN, 2)


def test_front_matter_without_a_date_or_a_number_is_plain_yaml() -> None:
    text = front_matter(a_job(datasets=[HUB_DATA, HUB_DATA]))

    assert yaml.safe_load(text.removeprefix("---\n").removesuffix("---\n"))["datasets"] == ["acme/tickets"]


@pytest.mark.parametrize(
    "change",
    [
        {"spec_hash": "0" * 64},
        {"rounds_done": [{"round": 3, "state": "merged", "start": "0" * 64, "adapter": "0" * 64, "merge_error": None,
                          "shards": []}]},
        {"owner": "[evil](http://x)"},
        {"state": "fine | <b>"},
        {"settlements": [{"round": 1, "root": "0x", "total": "1", "leaves": "0" * 64, "tx": "`x`"}]},
        {"evaluations": [{"round": 0, "loss": "3.0"}]},
    ],
)  # fmt: skip
def test_a_hub_that_tells_of_something_else_is_not_believed(change: dict[str, object]) -> None:
    job: ResolvedRecipe = a_job()
    view = told(job).model_dump(mode="json") | change

    with pytest.raises(TrainChainError) as caught:
        read_history(view, job)

    assert caught.value.code == "hub.not_a_hub"
    assert isinstance(read_history(told(job).model_dump(mode="json"), job), History)


def test_the_card_says_in_one_line_what_was_audited_and_what_came_of_it() -> None:
    job = a_job(check=UNCHECKED.model_copy(update={"auditors": "any"}))
    history = told(job)
    codes = iter(["audit.passed", "audit.differs", "audit.unaudited", None])
    rounds = [
        row.model_copy(
            update={
                "shards": [
                    shard.model_copy(update={"audit": ToldVerdict(state="x", code=code), "forfeited": code in REJECTS})
                    for shard, code in zip(row.shards, codes, strict=False)
                ]
            }
        )
        for row in history.rounds_done
    ]
    history = history.model_copy(update={"rounds_done": rounds})

    text = card(job, history, CHAIN, job.rounds, where=None)

    (line,) = [line for line in text.splitlines() if "Replays by chance" in line]
    assert "a segment of 4 shards was drawn" in line
    assert "1 passed, 1 rejected, 1 unaudited, for want of an auditor, 1 not decided yet" in line
    assert "No replay." not in text
    lost = shard_reward(job, 1, 1)
    assert f"{show(lost)} `TRAIN` more were forfeited" in text
    whole = sum(shard_reward(job, number, shard) for number in (1, 2) for shard in range(2))
    assert f"The workers earned {show(whole - lost)} `TRAIN`" in text
