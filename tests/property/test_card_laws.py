"""Whatever strangers call things, the card reads as we wrote it: its front matter, its headings, no link of theirs."""

from typing import Any

import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from tests.fixtures_card import CHAIN, COMMIT, HUB_DATA, a_job, told
from trainchain.core.card import card
from trainchain.core.errors import TrainChainError
from trainchain.core.markdown import code
from trainchain.core.models import Base, FileRef, PinnedSource, ResolvedRecipe, SourcePath

PIECES = (
    "\n|---|\n---\n|`|``|```|#|# |[a](http://e.x)|<b>|&lt;|- |: |!!|'|\"|{|}|*x*|\x85|\u2028|\u202e|\x1b[31m|http://e.x|"
    "www.e.x|@you|\\| |license: mit|tags:\n- x|![i](http://e.x/i.png)|<!-- |\r|\t|~~~|$x$"
)
NASTY = st.text(max_size=80) | st.lists(st.sampled_from([*PIECES.split("|"), "|"]), max_size=12).map("".join)
PARSER = MarkdownIt("commonmark", {"html": True}).enable("table")


def valid(kind: Any, text: str) -> bool:
    from pydantic import TypeAdapter, ValidationError

    try:
        TypeAdapter(kind).validate_python(text, strict=True)
    except ValidationError:
        return False
    return True


def outline(text: str) -> list[tuple[str, str]]:
    """All that a reader's eye or finger is led by: headings, links, images, HTML, fences."""
    led = []
    for token in PARSER.parse(text):
        if token.type == "heading_open":
            led.append(("heading", token.tag))
        elif token.type in ("fence", "code_block", "html_block", "hr"):
            led.append((token.type, token.content if token.type == "html_block" else ""))
        for child in token.children or []:
            if child.type in ("link_open", "image", "html_inline"):
                led.append((child.type, str(child.attrs)))
    return led


def job_of(license_: str, source: str, path: str, token: str, module: str) -> ResolvedRecipe:
    plain = a_job()
    data = HUB_DATA.model_copy(
        update={
            "source": source if valid(PinnedSource, source) else HUB_DATA.source,
            "file": FileRef(
                name="train-0.jsonl", sha256="0" * 64, size=1, path=path if valid(SourcePath, path) else None
            ),
        }
    )
    return a_job(
        base_model=Base(source=f"hf://acme/base@{COMMIT}", license=license_[:100], files=plain.base_model.files),
        datasets=[data],
        lora=plain.lora.model_copy(update={"targets": [module]}),
        pay=plain.pay.model_copy(update={"token": token}),
    )


@settings(max_examples=200, deadline=None)
@given(
    license_=NASTY,
    source=NASTY.map(lambda text: "hf://datasets/" + text),
    path=NASTY,
    token=NASTY,
    module=NASTY,
)
def test_names_of_strangers_change_nothing_but_themselves(
    license_: str, source: str, path: str, token: str, module: str
) -> None:
    job, plain = job_of(license_, source, path, token, module), job_of("x", HUB_DATA.source or "", "x", "x", "x")

    text = card(job, told(job), CHAIN, 2)

    found = ModelCard(text)
    head = found.data.to_dict()
    assert set(head) <= {
        "base_model",
        "base_model_relation",
        "library_name",
        "pipeline_tag",
        "license",
        "datasets",
        "tags",
    }
    assert head["base_model"] == "acme/base"
    assert head.get("license") in (None, license_.strip())
    assert head["tags"] == ["base_model:adapter:acme/base", "lora", "transformers", "trainchain"]
    assert outline(found.text) == outline(ModelCard(card(plain, told(plain), CHAIN, 2)).text)
    assert all(character.isprintable() or character == "\n" for character in text)


@given(NASTY)
def test_a_code_span_holds_exactly_one_line_of_the_text(text: str) -> None:
    (paragraph,) = [token for token in PARSER.parse("x " + code(text) + " y") if token.type == "inline"]

    kinds = [child.type for child in paragraph.children or []]

    assert kinds == ["text", "code_inline", "text"]


@given(
    st.recursive(
        st.none() | st.text() | st.integers() | st.floats(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    )
)
def test_a_hub_that_tells_of_anything_is_answered_in_words(value: Any) -> None:
    from trainchain.core.history import read_history

    job = a_job()
    view = told(job).model_dump(mode="json")
    for name in view:
        try:
            read_history({**view, name: value}, job)
        except TrainChainError as error:
            assert error.code == "hub.not_a_hub"  # noqa: PT017


def test_yaml_is_read_back_as_it_was_written() -> None:
    text = card(a_job(), told(a_job()), CHAIN, 2)
    front = text.split("---\n")[1]

    assert yaml.safe_dump(yaml.safe_load(front), sort_keys=False) == front
