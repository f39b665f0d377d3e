"""What an owner may write, and the one clear message for everything else."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from trainchain.core.errors import TrainChainError
from trainchain.core.recipe import INSTEAD, LATER, MAX_BYTES, OTHER_TOOLS, Recipe, load_recipe, parse_recipe

GOOD = """\
name: support-bot
base_model: ./base
datasets: [{path: ./train.jsonl}]
rounds: 2
shards: 3
steps: 4
pay: {per_million_tokens: "2.50", budget: "5"}
"""
HERE = Path("/somewhere")


def read(text: str) -> Recipe:
    return parse_recipe(text, "r.yaml", HERE)


def refusal(text: str) -> TrainChainError:
    with pytest.raises(TrainChainError) as caught:
        read(text)
    assert caught.value.exit_code == 2
    assert caught.value.message.endswith(".")
    assert caught.value.hint
    return caught.value


def with_line(line: str) -> str:
    """The good recipe with one line more; its number is 8."""
    return GOOD + line + "\n"


def with_value(key: str, value: str) -> str:
    """The good recipe with another value; a key that it has keeps its line."""
    lines = GOOD.splitlines()
    found = [at for at, line in enumerate(lines) if line.startswith(f"{key}:")]
    if not found:
        return with_line(f"{key}: {value}")
    lines[found[0]] = f"{key}: {value}"
    return "\n".join(lines) + "\n"


def test_a_small_recipe_gets_every_default() -> None:
    recipe = read(GOOD)

    assert (recipe.rounds, recipe.shards, recipe.steps) == (2, 3, 4)
    assert (recipe.lora_r, recipe.lora_alpha, recipe.lora_target_modules) == (8, 16, "all-linear")
    assert (recipe.round_deadline, recipe.pay.deadline, recipe.pay.grace) == (1800, 48 * 3600, 24 * 3600)
    assert recipe.pay.per_million_tokens == 25 * 10**17
    assert (recipe.test_datasets, recipe.samples, recipe.sample_tokens) == ([], [], 64)
    assert (recipe.lr_scheduler, recipe.warmup_steps, recipe.segment_steps) == ("constant", 0, None)
    assert (recipe.adapter, recipe.attention, recipe.adapter_path) == ("lora", None, "fused")
    assert (recipe.bf16, recipe.fp16, recipe.lora_dropout) == ("auto", False, 0)


def test_paths_are_taken_from_the_recipe_s_own_folder() -> None:
    text = with_line("test_datasets: [{path: ../held.jsonl, rows: 9}]")

    recipe = read(text)

    assert recipe.base_model == "/somewhere/base"
    assert recipe.datasets[0].path == "/somewhere/train.jsonl"
    assert recipe.test_datasets[0].path == "/somewhere/../held.jsonl"
    assert read(with_value("base_model", "/abs/olute")).base_model == "/abs/olute"


@pytest.mark.parametrize("address", ["hf://org/model", "azureml://registries/x", "azureml:model:3", "AzureML:model:3"])
def test_an_address_is_no_path(address: str) -> None:
    assert read(with_value("base_model", f'"{address}"')).base_model == address


@pytest.mark.parametrize(
    ("given", "seconds"), [("90s", 90), ("30m", 1800), ("48h", 172800), ("2d", 172800), ('" 5 m "', 300)]
)
def test_a_duration_has_a_unit(given: str, seconds: int) -> None:
    assert read(with_value("round_deadline", given)).round_deadline == seconds


@pytest.mark.parametrize("given", ["90", "30 minutes", "-5m", "1.5h", "m", "[30m]", "true", '""'])
def test_a_duration_without_a_unit_is_refused_with_an_example(given: str) -> None:
    error = refusal(with_value("round_deadline", given))

    assert error.code == "recipe.invalid"
    assert "r.yaml:8: `round_deadline` is" in error.message
    assert "30m" in error.message


@pytest.mark.parametrize(("given", "units"), [('"2.50"', 25 * 10**17), ("2.5", 25 * 10**17), ("3", 3 * 10**18)])
def test_an_amount_is_digits_with_or_without_quotes(given: str, units: int) -> None:
    text = with_value("pay", f"{{per_million_tokens: {given}, budget: 7}}")

    assert read(text).pay.per_million_tokens == units


@pytest.mark.parametrize("given", ["-1", '"1e3"', "1e-7", "free", "true", "[]", '"2,5"', ".inf", ".nan"])
def test_what_is_no_amount_is_refused(given: str) -> None:
    error = refusal(with_value("pay", f"{{per_million_tokens: {given}, budget: 7}}"))

    assert error.code == "recipe.invalid"
    assert "r.yaml:7: `pay.per_million_tokens` is" in error.message


@pytest.mark.parametrize(("given", "value"), [("1e-4", 1e-4), ("1.0e-4", 1e-4), ("2E-3", 2e-3), ("0.5", 0.5)])
def test_a_number_with_an_exponent_is_a_number(given: str, value: float) -> None:
    assert read(with_value("learning_rate", given)).learning_rate == value


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("learning_rat", "learning_rate"),
        ("Rounds", "rounds"),
        ("shard", "shards"),
        ("sequence_length", "sequence_len"),
        ("lora_alfa", "lora_alpha"),
        ("base-model", "base_model"),
        *OTHER_TOOLS.items(),
    ],
)
def test_an_unknown_key_is_refused_with_the_known_one(wrong: str, right: str) -> None:
    error = refusal(with_line(f"{wrong}: 1"))

    assert error.code == "recipe.unknown_key"
    assert f"r.yaml:8: `{wrong}`" in error.message
    assert error.hint == f"Write `{right}` instead."


def test_a_key_like_no_other_is_refused_with_all_there_are() -> None:
    error = refusal(with_line("zzz: 1"))

    assert "Known keys here: name, base_model, datasets" in error.hint


@pytest.mark.parametrize(
    ("text", "place", "hint"),
    [
        (with_value("pay", "{per_million_token: 1, budget: 5}"), "7: `pay.per_million_token`", "per_million_tokens"),
        (with_value("datasets", "[{path: a.jsonl, typ: text}]"), "3: `datasets.0.typ`", "`type`"),
        (with_line("merge: {metod: product-mean}"), "8: `merge.metod`", "`method`"),
        (with_line("test_datasets:\n  - path: a.jsonl\n    row: 3"), "10: `test_datasets.0.row`", "`rows`"),
    ],
)
def test_an_unknown_key_further_in_is_named_with_its_place(text: str, place: str, hint: str) -> None:
    error = refusal(text)

    assert f"r.yaml:{place}" in error.message
    assert hint in error.hint


@pytest.mark.parametrize("key", sorted(LATER))
def test_what_a_later_version_does_is_refused_by_name(key: str) -> None:
    error = refusal(with_line(f"{key}: 1"))

    assert error.code == "recipe.unsupported"
    assert f"r.yaml:8: `{key}`: this version does not have {LATER[key]}" in error.message
    assert error.hint == f"Remove `{key}` from the recipe."


@pytest.mark.parametrize("key", sorted(INSTEAD))
def test_a_word_for_something_else_is_refused_with_the_reason_and_what_to_write(key: str) -> None:
    error = refusal(with_line(f"{key}: true"))

    reason, hint = INSTEAD[key]
    assert (error.code, error.hint) == ("recipe.unsupported", hint)
    assert error.message == f"r.yaml:8: `{key}`: {reason}."


def test_flash_attention_leads_to_varlen() -> None:
    assert refusal(with_line("flash_attention: true")).hint == "Write `attention: varlen` instead."


@pytest.mark.parametrize("value", ["0.05", "1", "true", "~", '"0"'])
def test_dropout_is_refused_with_the_reason(value: str) -> None:
    error = refusal(with_line(f"lora_dropout: {value}"))

    assert error.message.startswith("r.yaml:8: `lora_dropout` is")
    assert "a replay of the training could not be exact" in error.message


@pytest.mark.parametrize("value", ["0", "0.0"])
def test_no_dropout_may_be_said(value: str) -> None:
    assert read(with_line(f"lora_dropout: {value}")).lora_dropout == 0


def test_half_precision_is_of_one_kind() -> None:
    error = refusal(with_line("bf16: true\nfp16: true"))

    assert (error.code, error.message.split(":")[1]) == ("recipe.invalid", "9")
    assert "`bf16: true` and `fp16: true` exclude each other" in error.message
    for other in ("auto", "false"):
        assert read(with_line(f"fp16: true\nbf16: {other}")).fp16


def test_samples_need_no_held_out_data() -> None:
    recipe = read(with_line('samples: ["Where is my parcel?"]'))

    assert (recipe.samples, recipe.test_datasets) == (["Where is my parcel?"], [])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "17"),
        ("name", '"has space"'),
        ("name", '"../up"'),
        ("name", '""'),
        ("name", "a" * 65),
        ("base_model", "[a]"),
        ("base_model", "~nobody-of-that-name/base"),
        ("base_model", r'"a\0b"'),
        ("chat_template", "~nobody-of-that-name/chatml.jinja"),
        ("chat_template", r'"a\0b"'),
        ("datasets", "[{path: ~nobody-of-that-name/a.jsonl}]"),
        ("datasets", r'[{path: "a\0b.jsonl"}]'),
        ("datasets", "train.jsonl"),
        ("datasets", "[]"),
        ("datasets", "[{type: text}]"),
        ("datasets", "[{path: 3}]"),
        ("datasets", "[{path: a, type: csv}]"),
        ("rounds", "0"),
        ("rounds", "-1"),
        ("rounds", '"3"'),
        ("rounds", "2.5"),
        ("rounds", "true"),
        ("rounds", "100001"),
        ("shards", "null"),
        ("learning_rate", "fast"),
        ("learning_rate", "0"),
        ("learning_rate", ".nan"),
        ("learning_rate", ".inf"),
        ("max_grad_norm", ".inf"),
        ("adam_epsilon", ".nan"),
        ("quorum", "0"),
        ("quorum", "1.1"),
        ("bf16", '"yes please"'),
        ("lora_target_modules", "[]"),
        ("lora_target_modules", "all"),
        ("adapter", "full"),
        ("attention", "flash"),
        ("adapter_path", "fast"),
        ("lr_scheduler", "linear"),
        ("warmup_steps", "-1"),
        ("shard_warmup_steps", "0.1"),
        ("segment_steps", "0"),
        ("fp16", "1"),
        ("samples", "hello"),
        ("samples", "[3]"),
        ("samples", '[""]'),
        ("samples", "[" + "a, " * 17 + "]"),
        ("sample_tokens", "0"),
        ("sample_tokens", "1025"),
        ("seed", "-1"),
        ("merge", "{method: average}"),
        ("merge", "{encoding: int2}"),
        ("merge", "{spares: 1.5}"),
        ("merge", "{leave_one_out: -0.1}"),
        ("merge", "{leave_one_out: 0.1}"),
        ("pay", "5"),
        ("pay", "{budget: 5}"),
        ("pay", "{token: USDC, per_million_tokens: 1, budget: 5}"),
    ],
)
def test_a_wrong_value_is_named_with_its_line(key: str, value: str) -> None:
    text = with_value(key, value)
    line = next(at for at, one in enumerate(text.splitlines(), 1) if one.startswith(f"{key}:"))

    error = refusal(text)

    assert error.code == "recipe.invalid"
    assert error.message.startswith(f"r.yaml:{line}: `{key}") or "is missing" in error.message
    assert key in error.message
    assert "pydantic" not in error.message
    assert "Value error" not in error.message


def test_leave_one_out_needs_data_to_measure_on() -> None:
    line = "merge: {leave_one_out: 0.02}"

    assert "needs `test_datasets`" in refusal(with_line(line)).message
    found = read(GOOD + f"test_datasets: [{{path: ./held-out.jsonl}}]\n{line}\n")
    assert (found.merge.leave_one_out, read(GOOD).merge.leave_one_out, found.merge.spares) == (0.02, None, 0.1)


def test_moments_are_handed_on_only_where_a_step_from_them_has_a_bound() -> None:
    """Else any delta at all would be within a worker's reach."""
    assert "needs an `adam_beta2` above" in refusal(with_line("adam_beta2: 0.8")).message
    assert read(with_line("adam_beta2: 0.8\nmerge: {moments: fresh}")).adam_beta2 == 0.8


@pytest.mark.parametrize("key", ["name", "base_model", "datasets", "rounds", "shards", "steps", "pay"])
def test_a_missing_key_is_named(key: str) -> None:
    text = "".join(line + "\n" for line in GOOD.splitlines() if not line.startswith(f"{key}:"))

    error = refusal(text)

    assert error.message == f"r.yaml: `{key}` is missing."
    assert error.hint == f"Add `{key}:` to the recipe."


def test_of_many_mistakes_the_first_in_the_file_is_told() -> None:
    error = refusal("nam: x\n" + GOOD + "rounds_: 3\n")

    assert "r.yaml:1: `nam`" in error.message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "rounds: 3\n", "r.yaml:8: the key `rounds` stands twice."),
        (GOOD.replace("budget:", "per_million_tokens:"), "r.yaml:7: the key `per_million_tokens` stands twice."),
        ("", "r.yaml is not a mapping of keys to values."),
        ("- a\n- b\n", "r.yaml is not a mapping of keys to values."),
        ("just words\n", "r.yaml is not a mapping of keys to values."),
        ("null\n", "r.yaml is not a mapping of keys to values."),
        ("name: [\n", "r.yaml:2:"),
        ("name: a\n\tb: c\n", "r.yaml:2:"),
        ("a: &x 1\nb: *x\n", "r.yaml: aliases are not read in a recipe."),
        ("name: !!python/object/apply:os.system [id]\n", "r.yaml:1:"),
        ("a: 1\n---\nb: 2\n", "r.yaml:2:"),
        ("name: \x07bell\n", "r.yaml"),
    ],
)
def test_what_is_no_yaml_mapping_is_refused_with_its_line(text: str, message: str) -> None:
    error = refusal(text)

    assert error.code == "recipe.not_yaml"
    assert error.message.startswith(message)


def test_a_recipe_of_a_thousand_brackets_is_refused() -> None:
    assert refusal("name: " + "[" * 1000).code == "recipe.not_yaml"


def test_a_bomb_of_aliases_is_refused_quickly() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]

    assert refusal("\n".join(lines)).code in ("recipe.unknown_key", "recipe.not_yaml")


@pytest.mark.parametrize("value", ["2024-01-01", "0x10", "0o17", "1_000", "on", "~", "!!binary aGk=", "{a: b}"])
def test_whatever_yaml_makes_of_a_value_is_no_traceback(value: str) -> None:
    for key in ("name", "steps", "learning_rate", "round_deadline", "pay", "datasets"):
        try:
            read(with_value(key, value))
        except TrainChainError as error:
            assert error.exit_code == 2  # noqa: PT017


@pytest.mark.parametrize("key", ["1", "null", "[a, b]", "{a: b}", "true", "1.5", "2024-01-01"])
def test_a_key_that_is_no_word_is_refused(key: str) -> None:
    assert refusal(with_line(f"? {key}\n: 1")).code in ("recipe.unknown_key", "recipe.not_yaml", "recipe.invalid")


def test_a_file_is_read_from_its_folder(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(GOOD, encoding="utf-8")

    assert load_recipe(tmp_path / "r.yaml").base_model == str(tmp_path / "base")


@pytest.mark.parametrize("data", [b"\xff\xfe\x00n", "name: f\xfcr".encode("latin-1")])
def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "r.yaml").write_bytes(data)

    with pytest.raises(TrainChainError, match="it is not UTF-8 text") as caught:
        load_recipe(tmp_path / "r.yaml")
    assert (caught.value.code, caught.value.exit_code) == ("usage.file", 2)


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"\xef\xbb\xbf" + GOOD.encode())

    assert load_recipe(tmp_path / "r.yaml").name == "support-bot"


@pytest.mark.parametrize("name", ["gone.yaml", "."])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(TrainChainError, match="cannot be read") as caught:
        load_recipe(tmp_path / name)
    assert caught.value.code == "usage.file"


def test_a_file_that_is_far_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "r.yaml").open("wb") as file:
        file.truncate(MAX_BYTES + 1)

    with pytest.raises(TrainChainError, match="not a recipe"):
        load_recipe(tmp_path / "r.yaml")


def test_every_other_tool_s_word_leads_to_a_key_there_is() -> None:
    assert set(OTHER_TOOLS.values()) <= set(Recipe.model_fields)
    assert not set(OTHER_TOOLS) & set(Recipe.model_fields)
    assert not {*LATER, *INSTEAD} & set(Recipe.model_fields)
    assert not set(LATER) & set(INSTEAD)


def test_the_example_recipes_are_read() -> None:
    folder = Path(__file__).parents[2] / "recipes"
    found = sorted(folder.glob("*/recipe*.yaml"))

    assert found
    for path in found:
        recipe: Any = load_recipe(path)
        assert yaml.safe_load(path.read_text(encoding="utf-8"))["name"] == recipe.name
