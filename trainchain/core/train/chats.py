"""Conversations as documents: what a row may hold, and which tokens of it the assistant says. No torch.

The mask is ours, not transformers': its own runs to the end of a row where the last character of a turn belongs to no
token, loses every turn where the first does, and misplaces turns that a macro renders.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trainchain.core.errors import TrainChainError

Document = tuple[list[int], list[bool]]
"""Token ids, and which of them the loss is taken on."""
Chat = list[dict[str, str]]
Spans = list[tuple[int, int]]

FIELDS = ("messages", "conversations")
"""Where a row may hold its conversation; the first that is there counts."""
TURN = ("role", "content")
SHAREGPT = ("from", "value")
SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
}
"""ShareGPT's names of who speaks, and a template's."""
READ_BY_TEMPLATES = ("name", "reasoning_content", "reasoning", "thinking")
WEIGHTS = ("weight", "train", "training", "loss")
"""By which other tools take a turn out of the loss; nothing is lost where they say what is done here anyway."""
TOOL_CALLS = ("tool_calls", "function_call")
NOT_TRAINED = ("tools", "functions", "images", "videos", "audios", "chat_template_kwargs")
"""Fields beside a conversation without which it would be another."""
ONLY_TEXT = "Leave such rows out, or write the whole conversation as text, under `text`."
TURN_AROUND = "Write a list: [dict(zip(m, turn)) for turn in zip(*m.values())] turns one such object `m` around."

_OPEN = re.compile(r"{%([-+]?)\s*generation\s*([-+]?)%}")
_CLOSE = re.compile(r"{%([-+]?)\s*endgeneration\s*([-+]?)%}")
_CHANGING = re.compile(r"strftime_now|\|\s*random\b")
_MARKS = ("trainchain_begins", "trainchain_ends")
_FIRST_MARK = 0xF0000
"""Code points from here on are for private use: two that a batch does not have mark its turns."""
FAMILIES = {"<|im_start|>": "<|im_end|>", "<|start_header_id|>": "<|eot_id|>", "<start_of_turn>": "<end_of_turn>"}
"""How a family of templates begins a turn, and ends it."""


class BadRow(ValueError):
    """What is wrong with a row, continuing a sentence that begins with its place, and what to do about it."""

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.hint = hint


def conversation(row: Mapping[str, Any]) -> Chat:
    """The row's messages as templates take them. Raises BadRow on whatever would not be trained as it is meant."""
    for name in NOT_TRAINED:
        if not _absent(row.get(name)):
            raise BadRow(f"has `{name}`, which this version does not train", ONLY_TEXT)
    field = next((name for name in FIELDS if row.get(name) is not None), FIELDS[0])
    turns = row.get(field)
    if isinstance(turns, Mapping):
        raise BadRow(f"has `{field}` as one object of lists, not as a list of {{role, content}}", TURN_AROUND)
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"lacks `{field}`, a list of {{role, content}}")
    return [_message(turn, at) for at, turn in enumerate(turns, 1)]


def _message(turn: Any, at: int) -> dict[str, str]:
    if not isinstance(turn, Mapping):
        raise BadRow(f"lacks the text `role` in message {at}, which is {kind_of(turn)}")
    keys = SHAREGPT if "from" in turn and "role" not in turn else TURN
    for name in TOOL_CALLS:
        if not _absent(turn.get(name)):
            raise BadRow(f"has `{name}` in message {at}, which this version does not train", ONLY_TEXT)
    found = {}
    for key, wanted in zip(keys, TURN, strict=True):
        value = turn.get(key)
        if not isinstance(value, str):
            raise BadRow(f"lacks the text `{key}` in message {at}{_but_has(value)}", _parts(value))
        check_unicode(value, f"`{key}` of message {at}")
        found[wanted] = value
    if keys is SHAREGPT:
        speaker = SPEAKERS.get(found["role"])
        if speaker is None:
            known = ", ".join(SPEAKERS)
            raise BadRow(f"has message {at} from {found['role']!r}; known are {known}", ONLY_TEXT)
        found["role"] = speaker
    for key, value in turn.items():
        if key in keys or _absent(value) or (key in WEIGHTS and value in (1, True)):
            continue
        if key in WEIGHTS:
            hint = "Leave it out, or split the row so that what is to be learned stands last, as prompt and completion."
            raise BadRow(f"has `{key}` {value!r} in message {at}, but every turn of the assistant is trained", hint)
        if key not in READ_BY_TEMPLATES or not isinstance(value, str):
            kept = ", ".join(f'"{name}": m["{name}"]' for name in keys)
            hint = f"Keep only what is said: {{{kept}}} of each message m."
            raise BadRow(f"has `{key}` in message {at}, which is no part of a conversation", hint)
        check_unicode(value, f"`{key}` of message {at}")
        found[key] = value
    return found


def _absent(value: Any) -> bool:
    """What tables with fixed columns write where there is nothing."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def _but_has(value: Any) -> str:
    return "" if value is None else f": it is {kind_of(value)}"


def _parts(value: Any) -> str:
    if not isinstance(value, list):
        return ""
    if all(isinstance(part, Mapping) and part.get("type", "text") == "text" for part in value):
        return 'Join its parts: "".join(part["text"] for part in m["content"]) for each message m.'
    return "Only text is trained: leave such rows out."


def kind_of(value: Any) -> str:
    """What a value is, to a person."""
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case str():
            return "a text"
        case bytes():
            return "bytes"
        case list():
            return "a list"
        case dict():
            return "an object"
        case _:
            return f"a {type(value).__name__}"


def check_unicode(text: str, where: str) -> None:
    """JSON can write half a surrogate pair, which is no text and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"has \\u{ord(text[error.start]):04x}, half a character, in {where}") from None


class ChatTemplate:
    """A tokenizer's chat template, and which of the tokens it makes are the assistant's."""

    def __init__(self, tokenizer: Any) -> None:
        """Raises TrainChainError data.format for a template that cannot say what the assistant says."""
        self._tokenizer = tokenizer
        self._template = _usable_template(tokenizer)
        # what each tag does to the blanks around it stays as it is, and so does the scope that it opens
        opens = rf"{{%\1 with %}}{{{{ {_MARKS[0]} }}}}{{% if true %}}{{% endif \2%}}"
        closes = rf"{{%\1 if true %}}{{% endif %}}{{{{ {_MARKS[1]} }}}}{{% endwith \2%}}"
        self._marked = _CLOSE.sub(closes, _OPEN.sub(opens, self._template))

    def documents(self, chats: Sequence[Chat]) -> list[Document]:
        """Raises ValueError saying what is wrong with one of them."""
        rendered = self.render(chats)
        try:
            made = self._tokenizer(
                [text for text, _ in rendered],
                add_special_tokens=False,
                return_offsets_mapping=True,
                return_attention_mask=False,
                return_token_type_ids=False,
            )
        except Exception as error:  # the tokenizer is the model's: it raises what it likes
            raise BadRow(f"is refused by the tokenizer: {error}") from None
        masks = [mask_of(offsets, spans) for offsets, (_, spans) in zip(made["offset_mapping"], rendered, strict=True)]
        return list(zip(made["input_ids"], masks, strict=True))

    def render(self, chats: Sequence[Chat]) -> list[tuple[str, Spans]]:
        """Each conversation's text, and where in it the assistant speaks."""
        texts = self._apply(chats, self._template)
        marks = _unused(texts)
        marked = self._apply(chats, self._marked, **dict(zip(_MARKS, marks, strict=True)))
        return [(text, _spans(text, other, marks)) for text, other in zip(texts, marked, strict=True)]

    def closes_turns(self) -> bool:
        """Whether more than the words of a turn is trained: else the model does not learn to end one."""
        try:
            ((text, spans),) = self.render(
                [[{"role": "user", "content": "u?"}, {"role": "assistant", "content": "a!"}]]
            )
        except ValueError:
            return True  # a template for other conversations: nothing can be said
        return not spans or not text[: spans[-1][1]].endswith("a!")

    def _apply(self, chats: Sequence[Chat], template: str, **marks: str) -> list[str]:
        try:
            found: list[str] = self._tokenizer.apply_chat_template(
                list(chats), chat_template=template, tokenize=False, **marks
            )
        except Exception as error:  # the template is the model's, too
            raise BadRow(f"is refused by the chat template: {error}") from None
        return found


def mask_of(offsets: Iterable[tuple[int, int]], spans: Spans) -> list[bool]:
    """Which tokens, given where each lies in a text, reach into one of the spans, which are in order and apart."""
    mask = []
    rest = iter([*spans, (1 << 62, 1 << 62)])
    first, last = next(rest)
    before = 0
    for start, end in offsets:
        # some tokenizers take blanks off a token's place; one of nothing but blanks then ends where it lies
        low = start if start < end or before > end else before
        while last <= low and end > last:
            first, last = next(rest)
        mask.append(low < last and end > first)
        if end > before:
            before = end
    return mask


def _usable_template(tokenizer: Any) -> str:
    from jinja2 import TemplateSyntaxError

    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    if not isinstance(template, str):
        raise TrainChainError(
            "data.format",
            "The data has chat messages, but the base model's tokenizer has no chat template.",
            hint="Write `chat_template: FILE` (docs/data.md has some), or take prompt/completion rows.",
        )
    if not _OPEN.search(template):
        end = next((end for begin, end in FAMILIES.items() if begin in template), "end-of-turn token")
        raise TrainChainError(
            "data.format",
            "The base model's chat template does not mark what the assistant says.",
            hint="Write `chat_template: FILE`, with {% generation %} before what it says and {% endgeneration %} after "
            f"its {end}; docs/data.md has some.",
        )
    if found := _CHANGING.search(template):
        raise TrainChainError(
            "data.format",
            f"The base model's chat template uses `{found[0]}`: the same row would be other tokens another time.",
            hint="Write `chat_template: FILE` with a fixed text in its place.",
        )
    if not getattr(tokenizer, "is_fast", False):
        raise TrainChainError(
            "data.format",
            f"The base model's tokenizer ({type(tokenizer).__name__}) does not tell where in a text its tokens lie.",
            hint="Add a tokenizer.json to the model folder, or use prompt and completion rows.",
        )
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "u"}], tokenize=False, chat_template=template)
    except TemplateSyntaxError as error:
        raise TrainChainError(
            "data.format",
            f"The base model's chat template cannot be read: {error.message} (its line {error.lineno}).",
            hint="Correct it, or write `chat_template: FILE` with another.",
        ) from None
    except Exception:  # it refuses this conversation, which need not be one of the data's
        pass
    return template


def _unused(texts: Iterable[str]) -> tuple[str, str]:
    taken = {letter for text in texts for letter in set(text) if ord(letter) >= _FIRST_MARK}
    free = (chr(point) for point in range(_FIRST_MARK, 0x110000) if chr(point) not in taken)
    return next(free), next(free)


def _spans(text: str, marked: str, marks: tuple[str, str]) -> Spans:
    """Where the marks stand in `text`, which is `marked` without them."""
    found: Spans = []
    at = depth = begun = 0
    pieces = re.split(f"([{marks[0]}{marks[1]}])", marked)  # every second one is a mark
    for piece in pieces:
        if piece == marks[0]:
            begun = at if depth == 0 else begun
            depth += 1
        elif piece == marks[1]:
            depth -= 1
            if depth == 0 and at > begun:
                found.append((begun, at))
        else:
            at += len(piece)
    if depth or "".join(pieces[::2]) != text:
        raise BadRow(
            "gets other text from the chat template once its {% generation %} marks are looked at",
            "In the template, put those marks around output itself, outside of filters that change it.",
        )
    return found
