"""Rows of jsonl files, and how a row of each format becomes a document. Needs a tokenizer, no torch."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from trainchain.core.errors import TrainChainError
from trainchain.core.models import DataFormat

Document = tuple[list[int], list[bool]]
"""Token ids, and which of them the loss is taken on."""
Rows = Sequence[Mapping[str, Any]]
Encoder = Callable[[Rows], list[Document]]

FIELDS: dict[DataFormat, tuple[str, ...]] = {
    "chat_template": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
MAX_ROW = 1 << 24
"""Bytes of one line; far more than any sequence_len takes."""
BATCH_ROWS = 64
BATCH_BYTES = 1 << 18
_GENERATION = re.compile(r"{%-?\s*generation\s*-?%}")
_CHANGING = re.compile(r"strftime_now|\|\s*random\b")


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each row with its 1-based line number; blank lines are passed over.

    Raises TrainChainError: source.missing, and data.format on a line that is not a JSON object in UTF-8.
    """
    return ((number, row) for number, row, _ in _sized_rows(path))


def read_batches(path: Path, limit: int | None = None) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    """The first `limit` rows as read_rows has them, some at a time; rows before a bad one come before its error."""
    rows = islice(_sized_rows(path), limit)
    while True:
        batch: list[tuple[int, dict[str, Any]]] = []
        size = 0
        try:
            for number, row, length in rows:
                batch.append((number, row))
                size += length
                if len(batch) == BATCH_ROWS or size >= BATCH_BYTES:
                    break
        except TrainChainError:
            if batch:
                yield batch
            raise
        if not batch:
            return
        yield batch


def _sized_rows(path: Path) -> Iterator[tuple[int, dict[str, Any], int]]:
    """Rows with their lines and their sizes in bytes."""
    for number, line in enumerate(_lines(path), 1):
        text = (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).rstrip(b"\r\n")
        if len(text) > MAX_ROW:
            hint = "Split it: of a row only the first sequence_len tokens are used."
            raise bad_row(path, number, f"is longer than {MAX_ROW >> 20} MiB", hint)
        if not text.strip():
            continue
        try:
            row = json.loads(text.decode("utf-8"))
        except UnicodeDecodeError as error:
            what = f"is not UTF-8 (byte {error.object[error.start]:#04x} at {error.start + 1})"
            raise bad_row(path, number, what) from None
        except (ValueError, RecursionError) as error:
            raise bad_row(path, number, f"is not JSON ({error})") from None
        if not isinstance(row, dict):
            raise bad_row(path, number, f"is a JSON {type(row).__name__}, not an object")
        yield number, row, len(text)


def _lines(path: Path) -> Iterator[bytes]:
    """The file's lines, each read up to what a mark and a line end add to MAX_ROW bytes, and a little more."""
    try:
        with path.open("rb") as file:
            while line := file.readline(MAX_ROW + 8):
                yield line
    except OSError as error:
        raise unreadable(path, error) from None


def detect_format(row: Mapping[str, Any]) -> DataFormat | None:
    """The format whose fields the row has, or None."""
    return next((name for name, fields in FIELDS.items() if all(key in row for key in fields)), None)


def format_of(path: Path) -> DataFormat:
    """The format of a file, read off its first row."""
    number, row = next(read_rows(path), (0, None))
    if row is None:
        raise TrainChainError("data.empty", f"{path.name} has no rows.", hint="It needs one JSON object a line.")
    found = detect_format(row)
    if found is None:
        wanted = ", ".join(f"{' and '.join(fields)} ({name})" for name, fields in FIELDS.items())
        raise bad_row(path, number, f"has the fields {', '.join(row) or 'none'}; known are: {wanted}")
    return found


def encoder(form: DataFormat, tokenizer: Any) -> Encoder:
    """The function from rows to their documents; it raises ValueError saying what is wrong with one of them.

    Many rows at once are the same documents as each alone, and faster.
    """
    if form == "chat_template":
        _check_template(tokenizer)
        return lambda rows: _chats(rows, tokenizer)
    bare = _ids([""], tokenizer)[0]
    eos: int | None = tokenizer.eos_token_id
    closes = bool(bare) and bare[-1] == eos and eos != tokenizer.bos_token_id
    end = [] if eos is None else [eos]

    def opened(texts: list[str]) -> list[list[int]]:
        found = _ids(texts, tokenizer)
        return [ids[:-1] for ids in found] if closes else found

    def prompt_completion(rows: Rows) -> list[Document]:
        prompts = opened([_text(row, "prompt") for row in rows])
        completions = _ids([_text(row, "completion") for row in rows], tokenizer, add_special_tokens=False)
        return [
            (prompt + completion + end, [False] * len(prompt) + [True] * len(completion + end))
            for prompt, completion in zip(prompts, completions, strict=True)
        ]

    def plain(rows: Rows) -> list[Document]:
        return [(ids + end, [True] * len(ids + end)) for ids in opened([_text(row, "text") for row in rows])]

    return prompt_completion if form == "prompt_completion" else plain


def _ids(texts: list[str], tokenizer: Any, **options: Any) -> list[list[int]]:
    try:
        made = tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, **options)
    except Exception as error:  # the tokenizer is the model's: it raises what it likes
        raise ValueError(f"is refused by the tokenizer: {error}") from None
    return list(made["input_ids"])


def _chats(rows: Rows, tokenizer: Any) -> list[Document]:
    chats = [_messages(row) for row in rows]
    try:
        made = tokenizer.apply_chat_template(chats, return_dict=True, return_assistant_tokens_mask=True)
    except Exception as error:  # so is the template
        raise ValueError(f"is refused by the chat template: {error}") from None
    marks = [[bool(mark) for mark in marks] for marks in made["assistant_masks"]]
    return list(zip(made["input_ids"], marks, strict=True))


def _messages(row: Mapping[str, Any]) -> list[Any]:
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError("lacks `messages`, a list of {role, content}")
    for at, message in enumerate(messages):
        for key in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(key), str):
                raise ValueError(f"lacks the text `{key}` in message {at + 1}")
            _check_unicode(message[key], f"`{key}` of message {at + 1}")
    return messages


def _check_template(tokenizer: Any) -> None:
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    if not isinstance(template, str):
        raise TrainChainError(
            "data.format",
            "The data has chat messages, but the base model's tokenizer has no chat template.",
            hint="Add chat_template.jinja to the model folder, or use prompt and completion rows.",
        )
    if not _GENERATION.search(template):
        raise TrainChainError(
            "data.format",
            "The base model's chat template does not mark what the assistant says.",
            hint="In chat_template.jinja, put what it says between {% generation %} and {% endgeneration %}.",
        )
    if found := _CHANGING.search(template):
        raise TrainChainError(
            "data.format",
            f"The base model's chat template uses `{found[0]}`: the same row would be other tokens another time.",
            hint="In chat_template.jinja, put a fixed text in its place.",
        )


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise ValueError(f"lacks the text `{key}`")
    _check_unicode(value, f"`{key}`")
    return value


def _check_unicode(text: str, where: str) -> None:
    """JSON can write half a surrogate pair, which is no text and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"has \\u{ord(text[error.start]):04x}, half a character, in {where}") from None


class BadRow(ValueError):
    """What is wrong with a row, continuing a sentence that begins with its place, and what to do about it."""

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.hint = hint


def place_of(path: Path, row: int) -> str:
    """How a row is named to people."""
    return f"{path.name} line {row}"


def bad_row(path: Path, line: int, what: str | ValueError, hint: str = "") -> TrainChainError:
    """The error that names file and line; `what` continues the sentence."""
    hint = hint or getattr(what, "hint", "") or "Correct that line, or give `type:` the format that the file has."
    return TrainChainError("data.format", f"{place_of(path, line)} {what}.", hint=hint, file=path.name, line=line)


def unreadable(path: Path, error: OSError) -> TrainChainError:
    return TrainChainError("source.missing", f"{path} cannot be read: {error.strerror}.")
