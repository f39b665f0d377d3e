"""How a row of each format becomes a document. Needs a tokenizer, no torch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from trainchain.core.errors import TrainChainError
from trainchain.core.models import DataFormat
from trainchain.core.train import tables
from trainchain.core.train.chats import FIELDS as CHATS
from trainchain.core.train.chats import NOT_TRAINED, BadRow, ChatTemplate, check_unicode, conversation, kind_of
from trainchain.core.train.chats import Document as Document
from trainchain.core.train.tables import bad_row as bad_row
from trainchain.core.train.tables import place_of as place_of
from trainchain.core.train.tables import unreadable as unreadable

Rows = Sequence[Mapping[str, Any]]
Encoder = Callable[[Rows], list[Document]]

FIELDS: dict[DataFormat, tuple[tuple[str, ...], ...]] = {
    "chat_template": tuple((name,) for name in CHATS),
    "prompt_completion": (("prompt", "completion"),),
    "text": (("text",),),
}
"""The fields of each format; any one of the groups."""
READ = {name for groups in FIELDS.values() for fields in groups for name in fields} | set(NOT_TRAINED)
"""All fields that decide a document; of parquet no other is decoded."""
ELSEWHERE = {  # rows as other tools know them: what to do
    ("instruction", "output"): "prompt: .instruction, completion: .output",
    ("instruction", "response"): "prompt: .instruction, completion: .response",
    ("question", "answer"): "prompt: .question, completion: .answer",
    ("prompt", "response"): "prompt: .prompt, completion: .response",
    ("input", "output"): "prompt: .input, completion: .output",
    ("conversation",): "messages: .conversation",
    ("content",): "text: .content",
}


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each row with its 1-based number; of JSON that is its line, and blank lines are passed over.

    Raises TrainChainError: source.missing, source.unsupported, and data.format on what is no row.
    """
    return ((number, row) for number, row, _ in tables.sized_rows(path, READ))


def read_batches(path: Path, limit: int | None = None) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    """The first `limit` rows as read_rows has them, some at a time; rows before a bad one come before its error."""
    return tables.batches(path, READ, limit)


def detect_format(row: Mapping[str, Any]) -> DataFormat | None:
    """The format whose fields the row has, or None."""
    for name, groups in FIELDS.items():
        if any(all(key in row for key in fields) for fields in groups):
            return name
    return None


def format_of(path: Path) -> DataFormat:
    """The format of a file, read off its first row."""
    number, row = next(read_rows(path), (0, None))
    if row is None:
        raise TrainChainError("data.empty", f"{path.name} has no rows.", hint="Check what wrote the file.")
    found = detect_format(row)
    if found is None:
        names = tables.field_names(path)
        known = "; ".join(f"{_named(groups)} ({name})" for name, groups in FIELDS.items())
        raise bad_row(path, number, f"has the fields {', '.join(names) or 'none'}; known are: {known}", _renaming(path))
    return found


def _named(groups: tuple[tuple[str, ...], ...]) -> str:
    return " or ".join(" and ".join(fields) for fields in groups)


def _renaming(path: Path) -> str:
    """What makes rows of a known other shape into ours."""
    names = tables.field_names(path)
    if {"chosen", "rejected"} <= set(names):
        return "Pairs of better and worse answers are not trained; write the better ones as prompt and completion."
    for fields, pairs in ELSEWHERE.items():
        if set(fields) <= set(names):
            return f"Rename them: {rename(path, pairs)}"
    return "Rename the fields; docs/data.md shows how."


def rename(path: Path, pairs: str) -> str:
    """The command that writes a file's fields under other names, given as jq has them."""
    new = f"renamed-{path.name}"
    if path.suffix != ".parquet":
        return f"jq -c '{{{pairs}}}' {quote(path.name)} > {quote(new)}"
    columns = ", ".join("'{}': t['{}']".format(*pair.split(": .")) for pair in pairs.split(", "))
    script = f"t = p.read_table('{path.name}'); p.write_table(a.table({{{columns}}}), '{new}')"
    return f'{tables.PYTHON}"{tables.TO_PARQUET}; {script}"'


def encoder(form: DataFormat, tokenizer: Any) -> Encoder:
    """The function from rows to their documents; it raises ValueError saying what is wrong with one of them.

    Many rows at once are the same documents as each alone, and faster.
    Raises TrainChainError data.format for a tokenizer that does not take this format.
    """
    if form == "chat_template":
        template = ChatTemplate(tokenizer)
        return lambda rows: template.documents([conversation(row) for row in rows])
    bare = _ids([""], tokenizer)[0]
    eos: int | None = tokenizer.eos_token_id
    if eos is None:
        raise TrainChainError(
            "data.format",
            f"The base model's tokenizer names no end token, so {form} rows would never teach the model to stop.",
            hint='In tokenizer_config.json of the model folder, set "eos_token" to the token that ends a text.',
        )
    closes = bool(bare) and bare[-1] == eos != tokenizer.bos_token_id
    end = [eos]

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


def read_documents(
    path: Path,
    form: DataFormat,
    tokenizer: Any,
    limit: int | None = None,
    *,
    vocab_size: int | None = None,
    used: int | None = None,
) -> Iterator[tuple[int, Document]]:
    """The documents of the file's first `limit` rows with their rows' numbers; of each the first `used` tokens matter.

    Raises TrainChainError: as read_rows and encoder do; data.format on a row that is no document; model.unreadable on
    a token id not below `vocab_size`.
    """
    encode = encoder(form, tokenizer)
    for batch in read_batches(path, limit):
        for number, document in _encoded(path, batch, encode):
            _check_ids(path, number, document[0][:used], tokenizer, vocab_size)
            yield number, document


def _encoded(path: Path, batch: list[tuple[int, dict[str, Any]]], encode: Encoder) -> Iterator[tuple[int, Document]]:
    try:
        documents = encode([row for _, row in batch])
    except ValueError:
        for number, row in batch:
            try:
                (document,) = encode([row])
            except ValueError as error:
                raise bad_row(path, number, error) from None
            yield number, document
    else:
        yield from zip([number for number, _ in batch], documents, strict=True)


def _check_ids(path: Path, row: int, ids: Sequence[Any], tokenizer: Any, vocab_size: int | None) -> None:
    if any(type(token) is not int for token in ids):
        raise bad_row(path, row, "has text that the tokenizer knows no token for")
    token = max(ids, default=0)
    if vocab_size is not None and token >= vocab_size:
        raise TrainChainError(
            "model.unreadable",
            f"{place_of(path, row)} has the token {token} ({tokenizer.convert_ids_to_tokens(token)!r}), but the "
            f"base model knows only the {vocab_size} tokens below {vocab_size}.",
            hint="The tokenizer in the model folder is not the model's own, or has tokens added; leave those out.",
            file=path.name,
            line=row,
        )


def _ids(texts: list[str], tokenizer: Any, **options: Any) -> list[list[int]]:
    try:
        made = tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, **options)
    except Exception as error:  # the tokenizer is the model's: it raises what it likes
        raise BadRow(f"is refused by the tokenizer: {error}") from None
    return list(made["input_ids"])


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if isinstance(value, str):
        check_unicode(value, f"`{key}`")
        return value
    hint = "Messages go under one field: put those of prompt and completion together as `messages`."
    what = f"lacks the text `{key}`" + ("" if value is None else f": it is {kind_of(value)}")
    raise BadRow(what, hint if isinstance(value, list) and value and isinstance(value[0], Mapping) else "")
