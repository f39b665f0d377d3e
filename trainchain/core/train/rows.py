"""Rows of jsonl files, and how a row of each format becomes a document. Needs a tokenizer, no torch."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trainchain.core.errors import TrainChainError
from trainchain.core.models import DataFormat

Document = tuple[list[int], list[bool]]
"""Token ids, and which of them the loss is taken on."""

FIELDS: dict[DataFormat, tuple[str, ...]] = {
    "chat_template": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
_GENERATION = re.compile(r"{%-?\s*generation\s*-?%}")


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each row with its 1-based line number; blank lines are passed over.

    Raises TrainChainError: source.missing, and data.format on a line that is not a JSON object in UTF-8.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise TrainChainError("source.missing", f"{path} cannot be read: {error.strerror}.") from None
    with file:
        for number, line in enumerate(file, 1):
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not text.strip():
                continue
            try:
                row = json.loads(text.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                raise bad_row(path, number, f"is not JSON ({error})") from None
            if not isinstance(row, dict):
                raise bad_row(path, number, f"is a JSON {type(row).__name__}, not an object")
            yield number, row


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


def encoder(form: DataFormat, tokenizer: Any) -> Callable[[Mapping[str, Any]], Document]:
    """The function from a row to its document; it raises ValueError saying what is wrong with the row."""
    if form == "chat_template":
        _check_template(tokenizer)
        return lambda row: _chat(row, tokenizer)
    bare = list(tokenizer("").input_ids)
    eos: int | None = tokenizer.eos_token_id
    closes = bool(bare) and bare[-1] == eos and eos != tokenizer.bos_token_id

    def opened(text: str) -> list[int]:
        ids = list(tokenizer(text).input_ids)
        return ids[:-1] if closes else ids

    end = [] if eos is None else [eos]

    def prompt_completion(row: Mapping[str, Any]) -> Document:
        prompt = opened(_text(row, "prompt"))
        completion = list(tokenizer(_text(row, "completion"), add_special_tokens=False).input_ids) + end
        return prompt + completion, [False] * len(prompt) + [True] * len(completion)

    def plain(row: Mapping[str, Any]) -> Document:
        ids = opened(_text(row, "text")) + end
        return ids, [True] * len(ids)

    return prompt_completion if form == "prompt_completion" else plain


def _chat(row: Mapping[str, Any], tokenizer: Any) -> Document:
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError("lacks `messages`, a list of {role, content}")
    for at, message in enumerate(messages):
        for key in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(key), str):
                raise ValueError(f"lacks the text `{key}` in message {at + 1}")
    try:
        made = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    except Exception as error:  # the template is the model's own program: it raises what it likes
        raise ValueError(f"is refused by the chat template: {error}") from None
    return list(made["input_ids"]), [bool(mark) for mark in made["assistant_masks"]]


def _check_template(tokenizer: Any) -> None:
    template = tokenizer.chat_template
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


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise ValueError(f"lacks the text `{key}`")
    return value


def bad_row(path: Path, line: int, what: str) -> TrainChainError:
    """The error that names file and line; `what` continues the sentence."""
    hint = "Correct that line, or give `type:` the format that the file has."
    return TrainChainError("data.format", f"{path.name} line {line} {what}.", hint=hint, file=path.name, line=line)
