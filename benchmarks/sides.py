"""One side of a benchmark, in a process of its own: `python sides.py SPEC.json` writes the spec's `result` file.

`launch.py` starts it and sets its environment. Every side starts from the same adapter, takes the same rows and
the same AdamW, and is timed by the same hook on torch's optimizers. Only `ours` imports TrainChain.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import rounds
from jobs import ALPHA, IGNORED, Document, Job, R, Step, real_tokens

BETAS, EPSILON, CLIP = (0.9, 0.999), 1e-8, 1.0
LEASE = "0x" + "00" * 32


class Clock:
    """When optimizer steps ended. `counted` is asked for the tokens trained, where only the side itself knows."""

    def __init__(self, spec: dict[str, Any]) -> None:
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self.imported = time.time() - spec["spawned"]
        self.counted: Callable[[], int] | None = None
        self._spec, self._done = spec, 0
        self._marks: dict[int, tuple[float, float, int]] = {}
        register_optimizer_step_post_hook(self._ended)

    def begin(self) -> None:
        """What was stepped so far trained nothing: the fingerprint of a numeric class takes steps of its own."""
        self._done = 0
        self._marks.clear()

    def _ended(self, *_: Any) -> None:
        self._done += 1
        if self._done in (1, self._spec["warm"], self._spec["steps"]):
            _synchronize()
            self._marks[self._done] = (time.time(), time.process_time(), self.counted() if self.counted else 0)

    def result(self, tokens: Sequence[int]) -> dict[str, Any]:
        """`tokens` of each step, real ones; the warm-up steps are not counted."""
        warm, last = self._spec["warm"], self._spec["steps"]
        if self._done != last:
            raise SystemExit(f"{self._done} optimizer steps were seen, not {last}")
        (began, idle, before), (ended, busy, after) = self._marks[warm], self._marks[last]
        trained = after - before if self.counted else sum(tokens[warm:last])
        if self.counted and tokens and trained != sum(tokens[warm:last]):
            raise SystemExit(f"the side counts {trained} tokens, the rows hold {sum(tokens[warm:last])}")
        return {
            "tokens_per_second": trained / (ended - began),
            "tokens_per_processor_second": round(trained / (busy - idle), 1),
            "tokens_per_step": round(trained / (last - warm), 1),
            "seconds_to_import": round(self.imported, 2),
            "seconds_to_first_step_done": round(self._marks[1][0] - self._spec["spawned"], 2),
            "peak_memory_mib": _peak_memory(),
        }


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    import torch

    torch.set_num_threads(spec["threads"])
    sides: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "gemm": gemm,
        "trl": trl,
        "plain": plain,
        "ours": ours,
        "overhead": overhead,
        "rounds": rounds.train,
        "score": score,
    }
    found = sides[spec["side"]](spec)
    Path(spec["result"]).write_text(json.dumps(found), encoding="utf-8")


def gemm(spec: dict[str, Any]) -> dict[str, Any]:
    """FLOP/s of a square product: the fastest of several, in the precision that is trained in."""
    import torch

    size = spec["size"]
    dtype, device = (torch.bfloat16, "cuda") if torch.cuda.is_available() else (torch.float32, "cpu")
    a, b = torch.randn(2, size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(8):
        _synchronize()
        began = time.perf_counter()
        a @ b
        _synchronize()
        best = min(best, time.perf_counter() - began)
    return {"flops_per_second": 2 * size**3 / best}


def trl(spec: dict[str, Any]) -> dict[str, Any]:
    """SFTTrainer on rows that are packed, tokenized and labelled already, so that it spends no time on them.

    `layout`: `packed` rows are flattened with their documents' position ids, as TRL's bfd packing is;
    `flat` does the same to single documents; `padded` and `grouped` (by length) pad single documents.
    """
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    clock = Clock(spec)
    job, layout, micro, stock = Job(Path(spec["job"])), spec["layout"], spec["micro"], spec["stock"]
    steps = job.steps()
    used = steps[: spec["steps"]]
    if layout == "packed":
        rows, per_step = [_row(sequence) for step in used for sequence in step], len(steps[0])
    else:
        documents = [document for step in steps for sequence in step for document in sequence]
        mean = sum(len(sequence) for step in used for sequence in step) / len(used)
        per_step = max(1, round(mean / micro)) * micro
        rows = [_row([document]) for document in documents[: per_step * spec["steps"]]]
    cuda = torch.cuda.is_available()
    quiet = {} if stock else {"gradient_checkpointing": False, "logging_strategy": "no"}
    config = SFTConfig(
        output_dir=str(Path(spec["result"]).with_suffix(".trl")),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=per_step // micro,
        max_steps=spec["steps"],
        learning_rate=spec["learning_rate"],
        lr_scheduler_type=spec["schedule"],
        warmup_steps=spec["warmup_steps"],
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_epsilon=EPSILON,
        weight_decay=0.0,
        max_grad_norm=CLIP,
        bf16=cuda,
        use_cpu=not cuda,
        train_sampling_strategy="group_by_length" if layout == "grouped" else "sequential",
        padding_free=layout in ("packed", "flat"),
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_pin_memory=cuda,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **quiet,
    )
    model = with_lora(job, flash=True)
    trainer = SFTTrainer(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=_tokens(job))
    clock.counted = lambda: int(trainer._total_train_tokens)
    trainer.train()
    known = [real_tokens(step) for step in used] if layout == "packed" else []
    return clock.result(known) | {"adapter": save(trainer.model, spec), "attention": model.config._attn_implementation}


def plain(spec: dict[str, Any]) -> dict[str, Any]:
    """Accelerate and PEFT in a loop of one's own: packed rows by position ids, padded to the longest."""
    import torch
    from accelerate import Accelerator

    clock = Clock(spec)
    job = Job(Path(spec["job"]))
    steps = job.steps()[: spec["steps"]]
    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    model = with_lora(job).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=spec["learning_rate"], betas=BETAS, eps=EPSILON, weight_decay=0.0, fused=True
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    for step in steps:
        targets = sum(label != IGNORED for sequence in step for _, labels in sequence for label in labels)
        for at in range(0, len(step), spec["micro"]):
            batch = padded(step[at : at + spec["micro"]], accelerator.device)
            accelerator.backward(model(**batch, use_cache=False, num_items_in_batch=targets).loss)
        accelerator.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()
    tokens = [real_tokens(step) for step in steps]
    return clock.result(tokens) | {"adapter": save(accelerator.unwrap_model(model), spec)}


def ours(spec: dict[str, Any]) -> dict[str, Any]:
    """The engine of `trainchain.core.train`, as the worker's child drives it, round after round."""
    from safetensors.numpy import save_file

    from trainchain.core.adapter import read_adapter

    job = Job(Path(spec["job"]))
    clock = Clock(spec)
    engine = _engine(spec)
    clock.begin()
    adapter = read_adapter(job.start)
    for round_ in range(1, engine.recipe.rounds + 1):
        result = engine.train(adapter, round_, 0, LEASE, lambda *_: None)
        adapter = result.end
    path = Path(spec["result"]).with_suffix(".safetensors")
    save_file(adapter, path)
    tokens = [real_tokens(step) for step in job.steps()[: spec["steps"]]]
    return clock.result(tokens) | {"adapter": str(path), "numeric_class": engine.numeric_class}


def overhead(spec: dict[str, Any]) -> dict[str, Any]:
    """Of every shard but the first on one resident engine: seconds to its first step, and all that is no step.

    A step lasts from the first module called after the step before to the end of the optimizer's step. States are
    hashed and written as they are for a worker.
    """
    from torch.nn.modules.module import register_module_forward_pre_hook
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from trainchain.core.adapter import read_adapter

    engine = _engine(spec)
    adapter = read_adapter(Job(Path(spec["job"])).start)
    entered: list[float] = []
    left: list[float] = []

    def enter(*_: Any) -> None:
        if len(entered) == len(left):
            entered.append(time.perf_counter())

    register_module_forward_pre_hook(enter)
    register_optimizer_step_post_hook(lambda *_: left.append(time.perf_counter()))
    found: dict[str, list[float]] = {"seconds_to_first_step": [], "seconds_outside_steps": [], "share_outside": []}
    for shard in range(engine.recipe.shards):
        entered.clear()
        left.clear()
        _synchronize()
        began = time.perf_counter()
        states = Path(spec["result"]).with_suffix(f".states-{shard}")
        engine.train(adapter, 1, shard, LEASE, lambda *_: None, states=states)
        seconds = time.perf_counter() - began
        outside = seconds - sum(after - before for before, after in zip(entered, left, strict=True))
        found["seconds_to_first_step"].append(entered[0] - began)
        found["seconds_outside_steps"].append(outside)
        found["share_outside"].append(100 * outside / seconds)
    return {name: values[1:] for name, values in found.items()}


def score(spec: dict[str, Any]) -> dict[str, Any]:
    """Mean loss per supervised token of each adapter, each document by itself, by PEFT and transformers alone."""
    import torch
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    job = Job(Path(spec["job"]))
    rows = Path(spec["rows"]) if "rows" in spec else None
    documents: list[Document] = (
        json.loads(rows.read_text(encoding="utf-8")) if rows else [d for s in job.steps()[-1] for d in s]
    )
    model = with_lora(job).eval().to("cuda" if torch.cuda.is_available() else "cpu")
    losses: dict[str, float] = {}
    for name, path in spec["adapters"].items():
        set_peft_model_state_dict(model, load_file(path))
        losses[name] = _loss(model, documents)
    return {"losses": losses}


def with_lora(job: Job, *, flash: bool = False) -> Any:
    """The base with PEFT's LoRA on every linear layer but the head, set to the job's start adapter."""
    import torch
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM
    from transformers.utils import is_flash_attn_2_available

    cuda = torch.cuda.is_available()
    kernel = "flash_attention_2" if flash and cuda and is_flash_attn_2_available() else "sdpa"
    base = AutoModelForCausalLM.from_pretrained(
        job.load()["model"], dtype=torch.bfloat16 if cuda else torch.float32, attn_implementation=kernel
    )
    config = LoraConfig(r=R, lora_alpha=ALPHA, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    loaded = set_peft_model_state_dict(model, load_file(job.start))
    if loaded.unexpected_keys or any("lora_" in key for key in loaded.missing_keys):
        raise SystemExit("the start adapter does not fit PEFT's model")
    return model


def padded(sequences: Step, device: Any) -> dict[str, Any]:
    """Rows of several documents; transformers keeps them apart where position ids begin anew, as padding does."""
    import torch

    length = max(sum(len(ids) for ids, _ in sequence) for sequence in sequences)
    shape = (len(sequences), length)
    ids, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORED)
    positions = torch.zeros(shape, dtype=torch.long)
    for place, sequence in enumerate(sequences):
        start = 0
        for tokens, targets in sequence:
            end = start + len(tokens)
            ids[place, start:end], labels[place, start:end] = torch.tensor(tokens), torch.tensor(targets)
            positions[place, start:end] = torch.arange(end - start)
            start = end
        positions[place, start:] = torch.arange(length - start)
    return {name: t.to(device) for name, t in (("input_ids", ids), ("labels", labels), ("position_ids", positions))}


def save(model: Any, spec: dict[str, Any]) -> str:
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    path = Path(spec["result"]).with_suffix(".safetensors")
    tensors = get_peft_model_state_dict(model)
    save_file({name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}, path)
    return str(path)


def _engine(spec: dict[str, Any]) -> Any:
    from trainchain.core.models import ResolvedRecipe, Training, parse
    from trainchain.core.train.trainer import Engine

    job = Job(Path(spec["job"]))
    recipe = parse(ResolvedRecipe, job.recipe.read_bytes(), code="job.invalid", what="The recipe")
    training = Training(**(recipe.training.model_dump() | spec["training"]))
    told = job.load()
    files = {digest: Path(path) for digest, path in told["files"].items()}
    recipe = recipe.model_copy(update={"training": training})
    return Engine(recipe, Path(told["model"]), files, threads=spec["threads"])


def _loss(model: Any, documents: Sequence[Document]) -> float:
    import torch

    total, targets = 0.0, 0
    with torch.no_grad():
        for ids, labels in documents:
            row = torch.tensor([ids], device=model.device)
            logits = model(input_ids=row, use_cache=False).logits[0, :-1].float()
            following = torch.tensor(labels[1:], device=model.device)
            total += float(torch.nn.functional.cross_entropy(logits, following, reduction="sum"))
            targets += int((following != IGNORED).sum())
    return total / targets


def _row(sequence: Sequence[Document]) -> dict[str, Any]:
    return {
        "input_ids": [token for ids, _ in sequence for token in ids],
        "labels": [label for _, labels in sequence for label in labels],
        "seq_lengths": [len(ids) for ids, _ in sequence],
    }


def _tokens(job: Job) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job.load()["model"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak_memory() -> int | None:
    import torch

    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20)
    try:
        import resource
    except ImportError:
        return None
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)


if __name__ == "__main__":
    main()
