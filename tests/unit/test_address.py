"""How places of models and data are written."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainchain.core.errors import TrainChainError
from trainchain.core.sources.address import AzureAddress, HubAddress, Local, is_address, parse
from trainchain.core.sources.found import FoundFile, check_kept, check_names, missing_shards, model_files

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAMES = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9._]?[A-Za-z0-9]){0,10}", fullmatch=True).filter(
    lambda name: name.lower() not in ("models", "datasets", "spaces", "buckets", "kernels")
)


@pytest.mark.parametrize(
    ("text", "asked", "meant"),
    [
        ("hf://gpt2", "model", HubAddress("model", "gpt2")),
        ("hf://gpt2@main", "model", HubAddress("model", "gpt2", "main")),
        ("hf://org/name", "model", HubAddress("model", "org/name")),
        ("HF://org/name/", "model", HubAddress("model", "org/name")),
        ("hf://models/org/name", "model", HubAddress("model", "org/name")),
        ("hf://org/name@v1.0", "model", HubAddress("model", "org/name", "v1.0")),
        (f"hf://org/name@{COMMIT}", "model", HubAddress("model", "org/name", COMMIT)),
        ("hf://org/name/sub/folder", "model", HubAddress("model", "org/name", None, "sub/folder")),
        ("hf://org/name@main/sub/folder", "model", HubAddress("model", "org/name", "main", "sub/folder")),
        ("hf://org/name@refs/pr/3", "model", HubAddress("model", "org/name", "refs/pr/3")),
        ("hf://org/name@refs/pr/3/sub", "model", HubAddress("model", "org/name", "refs/pr/3", "sub")),
        ("hf://org/name@feature%2Fx/sub", "model", HubAddress("model", "org/name", "feature/x", "sub")),
        ("hf://datasets/squad", "data", HubAddress("data", "squad")),
        ("hf://datasets/org/name", "data", HubAddress("data", "org/name")),
        ("hf://datasets/org/name/x/train-*.parquet", "data", HubAddress("data", "org/name", None, "x/train-*.parquet")),
        ("hf://datasets/org/name@main/a b.jsonl", "data", HubAddress("data", "org/name", "main", "a b.jsonl")),
        ("hf://me/name", "target", HubAddress("model", "me/name")),
        ("me/name", "target", HubAddress("model", "me/name")),
        ("me/name", "model", Local("me/name")),
        ("./folder", "data", Local("./folder")),
        ("azureml:name:3", "model", AzureAddress("azureml:name:3")),
        ("azureml:name", "target", AzureAddress("azureml:name")),
        ("azureml://registries/R/models/M/versions/1", "model", AzureAddress("azureml://registries/R/models/M/versions/1")),
        ("/subscriptions/x/y", "data", AzureAddress("/subscriptions/x/y")),
    ],
)  # fmt: skip
def test_an_address_is_read_as_it_is_meant(text: str, asked: str, meant: object) -> None:
    assert parse(text, asked) == meant  # type: ignore[arg-type]
    assert is_address(text) == ((not isinstance(meant, Local)) and text != "me/name")


@pytest.mark.parametrize(
    ("text", "asked", "code", "says"),
    [
        ("", "model", "source.address", "hf://org/name"),
        (" hf://org/name", "model", "source.address", "spaces"),
        ("hf://org/na\x1bme", "model", "source.address", "cannot be seen"),
        ("hf://", "model", "source.address", "no name"),
        ("hf://org//name", "model", "source.address", "no name"),
        ("hf://org/../name", "model", "source.address", "no name"),
        ("hf://org/name@", "model", "source.address", "@"),
        ("hf://org/name@..", "model", "source.address", "@"),
        ("hf://org/name@%2E%2E%2Fx", "model", "source.address", "@"),
        ("hf://org/name/../other", "model", "source.address", "no plain path"),
        ("hf://org/name/a\\b", "model", "source.address", "no plain path"),
        ("hf://org/name/*.safetensors", "model", "source.address", "pattern"),
        ("hf://org/name?rev=x", "model", "source.address", "no name"),
        ("hf://org/" + "n" * 100, "model", "source.address", "too long"),
        ("hf://org/name.git", "model", "source.address", ".git"),
        ("hf://datasets/org/name", "model", "source.address", "a model is asked for"),
        ("hf://datasets/me/name", "target", "source.address", "pushed to a model"),
        ("hf://org/name", "data", "source.address", "hf://datasets/org/name"),
        ("hf://spaces/org/name", "model", "source.address", "spaces"),
        ("hf://name", "target", "source.address", "nothing more"),
        ("me/name@main", "target", "source.address", "nothing more"),
        ("https://huggingface.co/org/name", "model", "source.address", "Write hf://org/name"),
        ("https://huggingface.co/org/name/tree/v2/sub?x=1", "model", "source.address", "Write hf://org/name@v2/sub"),
        ("https://huggingface.co/datasets/org/name", "data", "source.address", "Write hf://datasets/org/name"),
        ("https://huggingface.co/gpt2/tree/main", "model", "source.address", "Write hf://gpt2@main"),
        ("https://huggingface.co/a/b/tree/main/my%20sub", "model", "source.address", "Write hf://a/b@main/my sub"),
        ("https://huggingface.co/a/b/tree/refs%2Fpr%2F1", "model", "source.address", "Write hf://a/b@refs%2Fpr%2F1"),
        ("https://huggingface.co/a/b/blob/main/x/model.safetensors", "model", "source.address", "a/b@main/x"),
        ("https://huggingface.co/a/b/blob/main/config.json", "model", "source.address", "Write hf://a/b@main"),
        ("https://huggingface.co/datasets/a/b/blob/v1/my%20rows.jsonl", "data", "source.address", "b@v1/my rows.jsonl"),
        ("https://huggingface.co/datasets/a/b", "model", "source.address", "a model is asked for"),
        ("https://huggingface.co/a/b", "data", "source.address", "hf://datasets/a/b"),
        ("https://huggingface.co/me/name/tree/main", "target", "source.address", "Write hf://me/name"),
        ("https://huggingface.co/spaces/a/b", "model", "source.address", "spaces"),
        ("hf://huggingface.co/org/name", "model", "source.address", "Write hf://org/name"),
        ("huggingface.co/me/name", "target", "source.address", "Write hf://me/name"),
        ("hf://org/name@main/model.safetensors", "model", "source.address", "whole folder"),
        ("https://ml.azure.com/models/x", "model", "source.address", "azureml://"),
        ("https://example.org/model", "model", "source.unsupported", "hf://"),
        ("s3://bucket/key", "data", "source.unsupported", "s3://"),
    ],
)  # fmt: skip
def test_what_is_no_address_is_told_how_to_be_written(text: str, asked: str, code: str, says: str) -> None:
    with pytest.raises(TrainChainError) as failed:
        parse(text, asked)  # type: ignore[arg-type]

    assert failed.value.code == code
    assert says in f"{failed.value.message} {failed.value.hint}"
    assert failed.value.message.isprintable()


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/org/name?token=hf_secret",
        "https://me:hf_secret@huggingface.co/org/name",
        "https://hf_secret@huggingface.co/datasets/org/name",
        "https://me:hf_secret@example.org/model",
        "abfss://rows@account.dfs.core.windows.net/x?sig=hf_secret",
        "s3://key:hf_secret@bucket/rows",
        "hf://me:hf_secret@huggingface.co/org/name",
        "hf://datasets/me/name?token=hf_secret",
    ],
)
@pytest.mark.parametrize("asked", ["model", "data", "target"])
def test_a_signature_or_a_password_in_a_pasted_link_is_not_repeated(text: str, asked: str) -> None:
    with pytest.raises(TrainChainError) as failed:
        parse(text, asked)  # type: ignore[arg-type]

    assert "hf_secret" not in failed.value.message + failed.value.hint


@pytest.mark.parametrize("asked", ["model", "data", "target"])
@given(
    st.lists(st.sampled_from(["datasets", "models", "spaces", "a", "b%20c", "tree", "blob", "main", "..", "%2E%2E"]))
)
def test_what_a_link_is_said_to_be_written_as_can_be_written_so(asked: str, parts: list[str]) -> None:
    with pytest.raises(TrainChainError) as failed:
        parse("https://huggingface.co/" + "/".join(parts), asked)  # type: ignore[arg-type]

    _, said, written = (failed.value.hint or "").partition("Write hf://")
    if said and " is a page for people" in failed.value.message:
        assert isinstance(parse(f"hf://{written}", asked), HubAddress)  # type: ignore[arg-type]


def test_a_link_with_a_password_still_leads_to_its_address() -> None:
    with pytest.raises(TrainChainError) as failed:
        parse("https://me:hf_secret@huggingface.co/org/name", "model")

    assert failed.value.hint == "Write hf://org/name"


@pytest.mark.parametrize("text", ["azureml:name:1", "azureml:!!!", "azureml://models/name/versions/1", "azureml:"])
def test_a_target_in_azure_is_read_where_it_is_written(text: str) -> None:
    """Not when the adapter is there, and paid for."""
    with pytest.raises(TrainChainError) as failed:
        parse(text, "target")

    assert failed.value.code == "source.address"
    assert isinstance(parse("azureml:name", "target"), AzureAddress)


@given(
    kind=st.sampled_from(["model", "data"]),
    names=st.tuples(NAMES, NAMES),
    revision=st.none() | st.sampled_from(["main", "v1.0", "refs/pr/12", "feature/x", COMMIT]),
    path=st.none() | st.lists(NAMES, min_size=1, max_size=3).map("/".join),
)
def test_an_address_written_out_reads_as_itself(
    kind: str, names: tuple[str, str], revision: str | None, path: str | None
) -> None:
    address = HubAddress(kind, "/".join(names), revision, path)  # type: ignore[arg-type]

    assert parse(address.text, kind) == address  # type: ignore[arg-type]


@given(st.text(max_size=60), st.sampled_from(["model", "data", "target"]))
def test_any_text_is_an_address_or_an_error_of_ours(text: str, asked: str) -> None:
    for written in (text, "hf://" + text):
        with contextlib.suppress(TrainChainError):
            parse(written, asked)  # type: ignore[arg-type]


def found(*names: str) -> list[FoundFile]:
    return [FoundFile(name, 1, None) for name in names]


def test_of_weights_that_lie_there_twice_the_ones_that_load_are_kept() -> None:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    both = found("config.json", "model.safetensors.index.json", "consolidated.safetensors", "README.md", *shards)

    assert sorted(file.path for file in model_files(both, "x")) == [
        "config.json",
        *shards,
        "model.safetensors.index.json",
    ]
    single = found("a/config.json", "a/model.safetensors", "a/consolidated.safetensors", "a/x.py", "a/tokenizer.model")
    index = found(*[f"a/{name}" for name in ("model.safetensors.index.json", *shards)])
    for files in (single, single + index):  # of both, transformers loads the whole one and never looks at the index
        assert sorted(file.path for file in model_files(files, "x")) == [
            "a/config.json",
            "a/model.safetensors",
            "a/tokenizer.model",
        ]


def test_a_file_that_no_library_looks_for_is_not_the_model_s() -> None:
    """A job could not hold their names, and nobody can rename them in somebody else's repository."""
    odd = found(
        "my notes.txt",
        "\u043c\u043e\u0434.json",
        "a*b.json",
        "n" * 200 + ".json",
        ".hidden.json",
        "._model.safetensors",
    )

    kept = model_files(found("config.json", "model.safetensors", "vocab.txt") + odd, "x")

    assert [file.path for file in kept] == ["config.json", "model.safetensors", "vocab.txt"]


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["config.json", "pytorch_model.bin"], "pytorch_model.bin"),
        (["model.Q4.gguf"], "model.Q4.gguf"),
        (["config.json"], "no .safetensors"),
        (["adapter_config.json", "adapter_model.safetensors"], "is an adapter"),
        (["x.safetensors"], "no config.json"),
    ],
)
def test_a_repository_that_is_no_model_is_told_by_its_names(names: list[str], says: str) -> None:
    with pytest.raises(TrainChainError) as failed:
        model_files(found(*names), "hf://org/name")

    assert failed.value.code == "model.unreadable"
    assert says in failed.value.message


@pytest.mark.parametrize(
    "name", ["../x.json", "a/../../x", "/etc/x", "a//b", "a\\b", "a\x1b[2Jb", "a\nb", "a\u202eb", ""]
)
def test_a_name_that_leads_out_or_cannot_be_shown_is_refused(name: str) -> None:
    with pytest.raises(TrainChainError) as failed:
        check_names(["fine.json", name], "hf://org/name")

    assert failed.value.code == "source.unsafe"
    assert failed.value.message.isprintable()


@pytest.mark.parametrize("files", [found("a:b.json"), found("a.json", "a.json"), found(*map(str, range(1001)))])
def test_files_that_cannot_be_kept_are_refused(files: list[FoundFile]) -> None:
    with pytest.raises(TrainChainError, match="hf://org/name"):
        check_kept(files, "hf://org/name")


def test_a_shard_that_the_index_names_and_nobody_has_is_missing() -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"}}

    assert missing_shards(index, ["model-1.safetensors"]) == ["model-2.safetensors"]
    for broken in ({}, [], {"weight_map": [1]}, {"weight_map": {"a": 1}}):
        with pytest.raises(TrainChainError, match="weight_map"):
            missing_shards(broken, [])
