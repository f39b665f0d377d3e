"""Conversations: what a row may hold, and which tokens of it carry loss."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from tests.fixtures_model import chat_rows, make_tokenizer, write_jsonl
from trainchain.core.errors import TrainChainError
from trainchain.core.train.chats import ChatTemplate, conversation, mask_of
from trainchain.core.train.data import load_documents
from trainchain.core.train.rows import encoder

USER = {"role": "user", "content": "One?"}
SAYS = {"role": "assistant", "content": "Uno."}
BARE = (  # what the assistant says ends without a token of its own
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
)


def tokenizer_of(template: str | None = None, *, trims: bool = False) -> PreTrainedTokenizerFast:
    """`trims`: as GPT-2's and RoBERTa's, it takes blanks off a token's place in the text."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trims)
    tokenizer.chat_template = template or tokenizer.chat_template
    return tokenizer


def supervised(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    ((ids, mask),) = encoder("chat_template", tokenizer)([{"messages": messages}])
    return str(tokenizer.decode([token for token, on in zip(ids, mask, strict=True) if on]))


def transformers_mask(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    made = tokenizer.apply_chat_template([messages], return_dict=True, return_assistant_tokens_mask=True)
    return list(made["assistant_masks"][0])


@pytest.mark.parametrize("says", ["Uno. ", "   ", " Uno.", " Uno\n \n ", "\u20ac", "Uno \U0001f600"])
@pytest.mark.parametrize("trims", [False, True])
def test_a_turn_s_mask_ends_with_the_turn_whatever_its_first_and_last_letters_are(says: str, trims: bool) -> None:
    tokenizer = tokenizer_of(BARE, trims=trims)
    chat = [USER, {"role": "assistant", "content": says}, USER, {"role": "assistant", "content": says}, USER]

    assert supervised(tokenizer, chat) == says * 2


def test_transformers_own_mask_is_wrong_there() -> None:
    """Should this fail one day, theirs holds and ours can go."""
    tokenizer = tokenizer_of(BARE, trims=True)
    runs_on = transformers_mask(tokenizer, [{"role": "assistant", "content": "Uno. "}, USER])
    loses_all = transformers_mask(tokenizer, [{"role": "assistant", "content": " Uno."}, USER])

    assert runs_on[-1] == 1
    assert set(loses_all) == {0}


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["user", "assistant"]), st.text(max_size=8) | st.sampled_from([" a ", "<|im_end|>"])),
        min_size=1,
        max_size=5,
    )
)
def test_where_every_letter_has_a_token_the_mask_is_transformers(turns: list[tuple[str, str]]) -> None:
    chat = [{"role": role, "content": content} for role, content in turns]
    ((_, mask),) = encoder("chat_template", TOKENIZER)([{"messages": chat}])

    assert [int(on) for on in mask] == transformers_mask(TOKENIZER, chat)


TOKENIZER = tokenizer_of()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=30), st.data())
def test_a_mask_is_what_each_letter_alone_says(widths: list[tuple[int, bool]], data: st.DataObject) -> None:
    """Tokens side by side, some of no width: each is on if and only if a letter of it is in a span."""
    offsets = []
    end = 0
    for width, _ in widths:
        offsets.append((end, end + width))
        end += width
    inside = data.draw(st.lists(st.booleans(), min_size=end, max_size=end))
    spans = []
    for at, on in enumerate(inside):
        if on and at and inside[at - 1]:
            spans[-1] = (spans[-1][0], at + 1)
        elif on:
            spans.append((at, at + 1))

    for (start, stop), on in zip(offsets, mask_of(offsets, spans), strict=True):
        if start < stop:
            assert on == any(inside[start:stop])


def test_marks_inside_a_macro_are_where_the_text_comes_out() -> None:
    template = (
        "{% macro turn(m) %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{% endmacro %}"
        "{% for m in messages %}{{ turn(m) }}{% endfor %}"
    )

    assert supervised(tokenizer_of(template), [USER, SAYS, USER, SAYS]) == "Uno.<|im_end|>" * 2


def test_blanks_around_marks_are_kept_or_taken_as_the_template_says() -> None:
    for before, after in [("{%- ", " -%}"), ("{% ", " %}"), ("{%+ ", " +%}"), ("{%-", "%}")]:
        template = (
            "{% for m in messages %}\n  "
            f"{before}generation{after}\n  {{{{ m['content'] }}}}\n  {before}endgeneration{after}\n"
            "{% endfor %}"
        )
        tokenizer = tokenizer_of(template)
        ((text, spans),) = ChatTemplate(tokenizer).render([[USER]])

        wanted = tokenizer.apply_chat_template([USER], tokenize=False)
        made = tokenizer.apply_chat_template(
            [USER], return_dict=True, return_assistant_tokens_mask=True, tokenizer_kwargs={"return_offsets_mapping": 1}
        )
        begun = min(start for (start, _), on in zip(made["offset_mapping"], made["assistant_masks"], strict=True) if on)
        assert (text, spans[0][0]) == (wanted, begun), before


def test_text_with_letters_of_private_use_is_no_harm() -> None:
    says = {"role": "assistant", "content": "\U000f0000\U000f0001\ue000"}

    assert supervised(tokenizer_of(), [USER, says]) == says["content"] + "<|im_end|>"


def test_marks_inside_a_filter_that_changes_them_are_refused(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% filter truncate(3, True, '') %}{% generation %}{{ m['content'] }}{% endgeneration %}"
        "{% endfilter %}{% endfor %}"
    )
    path = write_jsonl(tmp_path / "rows.jsonl", chat_rows(2))

    with pytest.raises(TrainChainError, match=r"line 1 gets other text from the chat template") as caught:
        load_documents([(path, "chat_template")], tokenizer_of(template), 64)
    assert caught.value.code == "data.format"
    assert "outside of filters" in caught.value.hint


def test_a_row_whose_turns_the_template_marks_none_of_is_left_out(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": [USER]}, {"messages": [USER, SAYS]}])

    found = load_documents([(path, "chat_template")], TOKENIZER, 64)

    assert (found.skipped, len(found)) == (1, 1)
    assert found.skipped_at(1)[0].line == 1


@pytest.mark.parametrize(
    ("begin", "end"), [("<|im_start|>", "<|im_end|>"), ("<|start_header_id|>", "<|eot_id|>"), ("[INST]", "end-of-turn")]
)
def test_without_marks_the_hint_says_where_they_go_in_the_template_s_family(begin: str, end: str) -> None:
    with pytest.raises(TrainChainError, match="does not mark") as caught:
        encoder("chat_template", tokenizer_of("{{ '" + begin + "' }}"))

    assert end in caught.value.hint
    assert "{% generation %}" in caught.value.hint
    assert "docs/data.md" in caught.value.hint


def test_a_template_that_is_no_template_is_said_at_once() -> None:
    with pytest.raises(TrainChainError, match=r"chat template cannot be read: .* \(its line 2\)") as caught:
        encoder("chat_template", tokenizer_of("{% generation %}x{% endgeneration %}\n{% if %}"))

    assert caught.value.code == "data.format"


def test_a_tokenizer_that_tells_no_places_is_refused() -> None:
    class Slow:
        is_fast = False
        chat_template = make_tokenizer().chat_template

    with pytest.raises(TrainChainError, match=r"\(Slow\) does not tell where"):
        encoder("chat_template", Slow())


def test_a_template_that_marks_words_without_their_end_is_known() -> None:
    assert ChatTemplate(tokenizer_of()).closes_turns()
    assert not ChatTemplate(tokenizer_of(BARE)).closes_turns()


def test_sharegpt_conversations_are_the_same_documents() -> None:
    turns = [("system", "Be kind."), ("human", "One?"), ("gpt", "Uno."), ("user", "Two?"), ("chatgpt", "Dos.")]
    roles = ["system", "user", "assistant", "user", "assistant"]
    weights: list[Any] = [None, None, 1.0, None, True]
    theirs = [{"from": who, "value": says, "weight": w} for (who, says), w in zip(turns, weights, strict=True)]
    ours = [{"role": role, "content": says} for role, (_, says) in zip(roles, turns, strict=True)]
    encode = encoder("chat_template", TOKENIZER)

    assert conversation({"conversations": theirs}) == ours
    assert encode([{"conversations": theirs}]) == encode([{"messages": ours}]) == encode([{"conversations": ours}])


def test_what_a_table_writes_for_nothing_is_nothing() -> None:
    message = {**SAYS, "name": None, "tool_calls": [], "function_call": None, "id": "", "reasoning_content": None}

    assert conversation({"messages": [message], "tools": [], "images": None}) == [SAYS]


def test_what_templates_read_beside_the_words_is_handed_on() -> None:
    message = {**SAYS, "reasoning_content": "Count.", "name": "ada"}

    assert conversation({"messages": [message], "id": 7}) == [message]


@pytest.mark.parametrize(
    ("row", "says", "hint"),
    [
        ({"messages": {"role": ["user"], "content": ["x"]}}, "one object of lists", "zip"),
        ({"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "x"}]}]}, "a list", "join"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "`content` in message 1: it is",
            "Only text",
        ),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "lacks the text `content` in message 2", ""),
        ({"messages": [{**SAYS, "content": None, "tool_calls": [{"id": 1}]}]}, "`tool_calls` in message 1", "Leave"),
        ({"messages": [{**SAYS, "function_call": {"name": "f"}}]}, "`function_call` in message 1", "Leave"),
        ({"messages": [SAYS], "tools": [{"name": "f"}]}, "has `tools`", "Leave"),
        ({"messages": [SAYS], "images": ["a.png"]}, "has `images`", "Leave"),
        ({"messages": [{**SAYS, "weight": 0}]}, "has `weight` 0 in message 1", "prompt and completion"),
        ({"messages": [{**SAYS, "train": False}]}, "has `train` False in message 1", "Leave"),
        ({"messages": [{**SAYS, "country": "NL"}]}, "has `country` in message 1", '"content": m["content"]'),
        ({"conversations": [{"from": "gpt", "value": "x", "k": 1}]}, "has `k` in message 1", '"value": m["value"]'),
        ({"conversations": [{"from": "tool", "value": "x"}]}, "has message 1 from 'tool'; known are system", "Leave"),
        ({"conversations": [{"from": "gpt"}]}, "lacks the text `value` in message 1", ""),
        ({"conversations": []}, "lacks `conversations`", ""),
        ({"messages": "[]"}, "lacks `messages`, a list", ""),
        ({"messages": [3]}, "in message 1, which is a number", ""),
        ({"messages": [{"role": "user", "content": b"x"}]}, "it is bytes", ""),
    ],
)
def test_a_conversation_that_would_be_another_is_refused(row: dict[str, Any], says: str, hint: str) -> None:
    with pytest.raises(ValueError, match=r"^(has|lacks) ") as caught:
        conversation(row)

    assert says in str(caught.value)
    assert hint in getattr(caught.value, "hint", "")


def test_messages_under_prompt_and_completion_are_told_where_they_go(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": [USER], "completion": [SAYS]}])

    with pytest.raises(TrainChainError, match="line 1 lacks the text `prompt`: it is a list") as caught:
        load_documents([(path, "prompt_completion")], TOKENIZER, 64)
    assert "`messages`" in caught.value.hint
