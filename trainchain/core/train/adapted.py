"""The base model with the job's LoRA on it: Accelerate gives the device and joins processes, PEFT holds the LoRA.

All LoRA weights lie in one flat fp32 tensor, in the order of their names, and so do their gradients and AdamW's
moments: a step, a clip, a sum over processes and a snapshot are one operation each.
"""

import copy
import functools
import itertools
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from trainchain.core.adapter import Adapter
from trainchain.core.errors import TrainChainError
from trainchain.core.models import Lora, Training
from trainchain.core.segments import State
from trainchain.core.train import fused
from trainchain.core.train.data import TokenizedData
from trainchain.core.train.device import DTYPES, check_device
from trainchain.core.train.head import Head, ModelHead, TiledHead
from trainchain.core.train.model import leave_files, load_model
from trainchain.core.train.packed import ATTENTION, MicroBatch, lay_out

LOSS_SCALE = {"fp16": 1024.0}
"""Fixed, so that it is no state of its own: small gradients stay above fp16's smallest number."""
PROBE_TOKENS = 16


class AdaptedModel:
    """The LoRA weights are fp32 and the only ones that train; the base has the recipe's precision."""

    def __init__(
        self,
        training: Training,
        lora: Lora,
        model_dir: Path,
        *,
        checkpointing: bool = False,
        lanes: int = 1,
        volatile: bool = False,
    ) -> None:
        self._training = training
        # With several processes Accelerate joins CPUs only when it is told to use them.
        together = int(os.environ.get("WORLD_SIZE", "1")) > 1
        self._accelerator = Accelerator(mixed_precision="no", cpu=together and not torch.cuda.is_available())
        self.device: torch.device = self._accelerator.device
        check_device(self.device, training)
        base = load_model(
            model_dir,
            dtype=DTYPES[training.precision],
            attention=ATTENTION[training.attention],
            quantization=training.quantization,
        )
        modules = dict(base.named_modules())
        config = LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            target_modules=list(lora.targets),
            task_type="CAUSAL_LM",
            fan_in_fan_out=any(isinstance(modules.get(target), Conv1D) for target in lora.targets),
        )
        try:
            self.model = get_peft_model(base, config).to(self.device).eval()
        except ValueError as error:
            raise TrainChainError("job.invalid", f"The targets do not fit the base: {error}") from None
        if volatile:
            leave_files(self.model)
        self.base = self.model.get_base_model()
        for module in self.base.modules():
            if type(module).__name__ == "Linear4bit":
                module.training = True  # outside training bitsandbytes repacks weights for kernels that cannot go back
        self._flatten()
        self.begin({name: np.zeros(shape, np.float32) for name, shape in self.shapes.items()})
        if checkpointing:
            _checkpoint(self.base)
        self.adapter_path = "peft"
        self._lanes = [_Lane(self, ModelHead(self.base), self._gradients)]
        self._wanted_lanes = lanes
        self._threads = ThreadPoolExecutor(lanes, "lane")

    def _flatten(self) -> None:
        named = {
            name.replace(".default.", "."): parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }
        parameters = [named[name] for name in sorted(named)]
        self.shapes = {name: tuple(named[name].shape) for name in sorted(named)}
        sizes = [parameter.numel() for parameter in parameters]
        self._weights = torch.nn.Parameter(torch.zeros(sum(sizes), device=self.device))
        self._gradients = torch.zeros_like(self._weights)
        self._weights.grad = self._gradients
        parts = zip(self._weights.data.split(sizes), self._gradients.split(sizes), strict=True)
        for parameter, (weight, gradient) in zip(parameters, parts, strict=True):
            parameter.data = weight.view(parameter.shape)
            parameter.grad = gradient.view(parameter.shape)
        self._sizes = sizes

    @property
    def processes(self) -> tuple[int, int]:
        """(this one's number, how many there are)."""
        return self._accelerator.process_index, self._accelerator.num_processes

    def begin(self, start: Adapter) -> None:
        """Set the LoRA weights, for measuring; AdamW begins anew.

        Raises TrainChainError job.invalid, naming the tensor.
        """
        zeros = torch.zeros_like(self._weights)
        self._set(self._joined(start, "The adapter"), zeros, zeros.clone(), 0)

    def restore(self, state: State, before: int = 0, what: str = "The state") -> None:
        """Go on from a state as if this process had come there itself; its moments saw `before` steps before the
        shard's."""
        w, m, v = (self._joined(part, what) for part in (state.w, state.m, state.v))
        self._set(w, m, v, before + state.t)

    def _joined(self, tensors: Mapping[str, NDArray[np.float32]], what: str) -> Tensor:
        for name in sorted(self.shapes.keys() | tensors.keys()):
            mine, theirs = self.shapes.get(name), tensors[name].shape if name in tensors else None
            if mine != theirs:
                found = "is not there" if theirs is None else f"has the shape {list(theirs)}"
                wanted = "the recipe has no such tensor" if mine is None else f"the recipe's has {list(mine)}"
                raise TrainChainError("job.invalid", f"{what} is of another base or recipe: {name} {found}, {wanted}.")
        flat = np.concatenate([np.ravel(tensors[name]) for name in self.shapes]).astype(np.float32)
        return torch.from_numpy(flat).to(self.device)

    def _set(self, w: Tensor, m: Tensor, v: Tensor, t: int) -> None:
        training = self._training
        self._weights.data.copy_(w)
        self._gradients.zero_()
        self._optimizer = torch.optim.AdamW(
            [self._weights],
            lr=training.learning_rate,
            betas=(training.adam_beta1, training.adam_beta2),
            eps=training.adam_epsilon,
            weight_decay=training.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )
        step = torch.tensor(float(t), device=self.device)
        self._optimizer.state[self._weights] = {"step": step, "exp_avg": m, "exp_avg_sq": v}

    def snapshot(self, t: int) -> State:
        """Round AdamW's moments to bf16, so that what is committed is what goes on, and copy all three."""
        slot = self._optimizer.state[self._weights]
        for moment in (slot["exp_avg"], slot["exp_avg_sq"]):
            moment.copy_(moment.bfloat16())
        w, m, v = (self._parted(flat) for flat in (self._weights, slot["exp_avg"], slot["exp_avg_sq"]))
        return State(t, w, m, v)

    def adapter(self) -> Adapter:
        """A copy of the LoRA weights as they are now."""
        return self._parted(self._weights)

    def _parted(self, flat: Tensor) -> dict[str, NDArray[np.float32]]:
        array = flat.detach().cpu().numpy().copy()
        parts = np.split(array, list(itertools.accumulate(self._sizes))[:-1])
        return {name: part.reshape(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    @property
    def lanes(self) -> int:
        """How many micro-batches are trained on at the same time."""
        return len(self._lanes)

    def step(self, batches: Sequence[Sequence[MicroBatch]], targets: int, rate: float) -> tuple[Tensor, Tensor]:
        """One update on the mean loss over a step's targets; the step's loss and gradient norm, on the device.

        `batches` are those of each lane. Lanes, and then processes, are summed in their order: who is first
        does not matter.
        """
        scale = LOSS_SCALE.get(self._training.precision, 1.0)
        parts = zip(self._lanes, batches, strict=True)
        futures = [self._threads.submit(_accumulate, lane, part, scale, targets) for lane, part in parts]
        totals = [future.result() for future in futures]
        total = functools.reduce(torch.add, totals)
        for lane in self._lanes[1:]:
            self._gradients.add_(lane.gradients)
        if self._accelerator.num_processes > 1:
            self._gradients.copy_(self._accelerator.reduce(self._gradients, "sum"))
            total = self._accelerator.reduce(total, "sum")
        if scale != 1.0:
            self._gradients.div_(scale)
        norm = self._gradients.norm()
        self._gradients.mul_((self._training.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.step()
        return total, norm

    def loss_sums(self, batches: Sequence[MicroBatch]) -> list[Tensor]:
        """The summed loss of each micro-batch, without gradients."""
        hands = [batches[place :: self.lanes] for place in range(self.lanes)]
        found = list(self._threads.map(_losses, self._lanes, hands))
        return [found[at % self.lanes][at // self.lanes] for at in range(len(batches))]

    def loss_sum(self, batch: MicroBatch, lane: int = 0) -> Tensor:
        """The negative log-likelihood of all targets, summed in fp32, on the device."""
        with self.autocast():
            return self._lanes[lane].head.loss_sum(batch)

    def logits(self, batch: MicroBatch) -> Tensor:
        """(targets, vocabulary)."""
        with self.autocast():
            return self._lanes[0].head.logits(batch)

    def autocast(self) -> Any:
        half = self._training.precision != "fp32"
        return torch.autocast(self.device.type, dtype=DTYPES[self._training.precision] if half else None, enabled=half)

    def prove(self, documents: TokenizedData) -> None:
        """See on a few tokens that the fast ways compute what the model and PEFT compute, and take them.

        Raises TrainChainError model.unreadable for a model whose packed documents see each other, or whose
        attention is not what ours replaces. Whatever is fast but not the same is left to the library.
        """
        texts = [documents.ids[row][:PROBE_TOKENS] for row in (0, len(documents.ids) - 1)]
        batch = lay_out([(ids, np.ones(len(ids), np.bool_)) for ids in texts], self.device)
        exact = self._training.precision == "fp32" and self._training.quantization == "none"
        try:
            with torch.no_grad():
                packed = self.logits(batch).float()
                alone = self._alone(batch)
        except (TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "memory" in str(error):
                raise
            raise TrainChainError("model.unreadable", f"The model cannot train packed: {error}.") from None
        off = float((packed[batch.lengths[0] - 1 :] - alone).abs().max() / alone.abs().max().clamp(min=1e-6))
        if not off <= (1e-3 if exact else 0.1):
            raise TrainChainError(
                "model.unreadable",
                f"The model does not keep packed documents apart (logits off by {off:.1e}).",
                hint="A model with state beyond attention cannot be trained packed; choose another base.",
            )
        self._prove_head(batch, packed, 1e-4 if exact else 0.1)
        if self._training.adapter_path == "fused":
            self._prove_fused(batch, 1e-4 if exact else 0.1)
        self._lanes += [self._another_lane() for _ in range(self._wanted_lanes - 1)]

    def _alone(self, batch: MicroBatch) -> Tensor:
        """The second document's logits under the model's own attention, without the first."""
        ours = self.base.config._attn_implementation
        try:
            self.base.set_attn_implementation("eager")
            with self.autocast():
                ids = batch.ids[:, batch.lengths[0] :]
                found: Tensor = self.base(input_ids=ids, use_cache=False).logits[0, :-1].float()
        finally:
            self.base.set_attn_implementation(ours)
        return found

    def _another_lane(self) -> "_Lane":
        """A second model on the same weights, with gradients of its own; only activations take memory anew."""
        shared = [*self.base.parameters(), *fused.tensors(self.base)]
        trained = {id(parameter) for parameter in self.base.parameters() if parameter.requires_grad}
        twin = copy.deepcopy(self.base, {id(each): each for each in shared if id(each) not in trained})
        gradients = torch.zeros_like(self._gradients)
        for mine, its in zip(_trained(self.base), _trained(twin), strict=True):
            offset = mine.data.storage_offset()
            its.data = mine.data
            its.grad = gradients[offset : offset + mine.numel()].view(mine.shape)
        head = ModelHead(twin) if isinstance(self._lanes[0].head, ModelHead) else TiledHead(twin)
        return _Lane(self, head, gradients)

    def _prove_head(self, batch: MicroBatch, wanted: Tensor, tolerance: float) -> None:
        plain = self._lanes[0].head
        try:
            self._lanes[0].head = TiledHead(self.base)
            with torch.no_grad():
                found = self.logits(batch).float()
        except (TypeError, ValueError, AttributeError, NotImplementedError):
            self._lanes[0].head = plain
            return
        if found.shape != wanted.shape or not float((found - wanted).abs().max()) <= tolerance * float(
            wanted.abs().max()
        ):
            self._lanes[0].head = plain

    def _prove_fused(self, batch: MicroBatch, tolerance: float) -> None:
        random = np.random.default_rng(0)
        self.begin({name: random.normal(0, 0.05, shape).astype(np.float32) for name, shape in self.shapes.items()})
        wanted = self._gradient(batch)
        if fused.attach(self.model, functools.partial(self._watch, batch)):
            self.adapter_path = "fused"
            found = self._gradient(batch)
            if not float((found - wanted).norm()) <= tolerance * float(wanted.norm()):
                fused.detach(self.model)
                self.adapter_path = "peft"

    def _watch(self, batch: MicroBatch) -> None:
        with torch.no_grad():
            self.loss_sum(batch)

    def _gradient(self, batch: MicroBatch) -> Tensor:
        self._gradients.zero_()
        self.loss_sum(batch).backward()
        return self._gradients.clone()


@dataclass
class _Lane:
    """One of several ways through the model that run at the same time, each in a thread.

    Two threads that share every matrix product wait for each other thousands of times a step; two lanes meet once.
    """

    model: AdaptedModel
    head: Head
    gradients: Tensor


def _accumulate(lane: _Lane, batches: Sequence[MicroBatch], scale: float, targets: int) -> Tensor:
    """The lane's part of a step: its gradient, and its loss."""
    total = torch.zeros((), device=lane.gradients.device)
    lane.gradients.zero_()
    for batch in batches:
        with lane.model.autocast():
            loss = lane.head.loss_sum(batch) / targets
        (loss * scale).backward()
        total += loss.detach()
    return total


def _losses(lane: _Lane, batches: Sequence[MicroBatch]) -> list[Tensor]:
    with torch.no_grad(), lane.model.autocast():
        return [lane.head.loss_sum(batch) for batch in batches]


def _trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _checkpoint(base: torch.nn.Module) -> None:
    """Recompute each layer's inner values in the backward pass instead of keeping them: exact, and a third slower.

    The flag is set on the layers alone: in a module's training mode some models would drop out.
    """
    layers = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        layer.training = True
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = functools.partial(
            checkpoint, use_reentrant=False, preserve_rng_state=False
        )
