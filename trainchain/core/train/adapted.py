"""The base model with the job's LoRA on it: Accelerate drives device and precision, PEFT holds the LoRA."""

from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from transformers.pytorch_utils import Conv1D

from trainchain.core.adapter import Adapter, tensor_specs
from trainchain.core.errors import TrainChainError
from trainchain.core.models import ResolvedRecipe
from trainchain.core.train.data import TokenizedData
from trainchain.core.train.model import load_model
from trainchain.core.train.packed import ATTENTION, logits, micro_batch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROBE_TOKENS = 16


class AdaptedModel:
    """The LoRA weights are fp32 and the only ones that train; the base has the recipe's precision."""

    def __init__(self, recipe: ResolvedRecipe, model_dir: Path) -> None:
        self._training = recipe.training
        precision, lora = recipe.training.precision, recipe.lora
        base = load_model(model_dir, dtype=DTYPES[precision], attention=ATTENTION[recipe.training.attention])
        modules = dict(base.named_modules())
        config = LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            target_modules=list(lora.targets),
            task_type="CAUSAL_LM",
            fan_in_fan_out=any(isinstance(modules.get(target), Conv1D) for target in lora.targets),
        )
        try:
            model = get_peft_model(base, config)
        except ValueError as error:
            raise TrainChainError("job.invalid", f"The targets do not fit the base: {error}") from None
        AcceleratorState._reset_state(reset_partial_state=True)
        self._accelerator = Accelerator(mixed_precision="bf16" if precision == "bf16" else "no")
        self.device: torch.device = self._accelerator.device
        self.model = self._accelerator.prepare_model(model).eval()
        self._parameters: dict[str, torch.nn.Parameter] = {
            name.replace(".default.", "."): parameter
            for name, parameter in sorted(self.model.named_parameters())
            if parameter.requires_grad
        }

    def load(self, adapter: Adapter) -> None:
        """Set the LoRA weights. Raises TrainChainError job.invalid when they are not the targets'."""
        shapes = {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}
        if tensor_specs(adapter) != shapes:
            raise TrainChainError("job.invalid", "The adapter's tensors are not those of the recipe's targets.")
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(torch.from_numpy(adapter[name]))
                parameter.grad = None

    def adapter(self) -> Adapter:
        """A copy of the LoRA weights as they are now."""
        return {name: _array(parameter) for name, parameter in self._parameters.items()}

    def optimizer(self) -> torch.optim.AdamW:
        """A fresh AdamW: moments never outlive a shard."""
        training = self._training
        return torch.optim.AdamW(
            list(self._parameters.values()),
            lr=training.learning_rate,
            betas=(training.adam_beta1, training.adam_beta2),
            eps=training.adam_epsilon,
            weight_decay=training.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )

    def moments(self, optimizer: torch.optim.AdamW) -> tuple[Adapter, Adapter]:
        """AdamW's m and v under the adapter's names."""
        state = {name: optimizer.state[parameter] for name, parameter in self._parameters.items()}
        m = {name: _array(slot["exp_avg"]) for name, slot in state.items()}
        return m, {name: _array(slot["exp_avg_sq"]) for name, slot in state.items()}

    def backward(self, loss: torch.Tensor) -> None:
        self._accelerator.backward(loss)

    def clip(self) -> None:
        torch.nn.utils.clip_grad_norm_(self._parameters.values(), self._training.max_grad_norm)

    def prove_packing(self, documents: TokenizedData) -> None:
        """Refuse a model whose packed documents see each other, or whose attention is not what ours replaces.

        Compares the second of two packed documents with the same document alone under the model's own
        attention.
        """
        probe = TokenizedData()
        for ids in (documents.ids[0], documents.ids[-1]):
            probe.add((ids.tolist(), [True] * len(ids)), PROBE_TOKENS)
        batch = micro_batch(probe, [0, 1], self.device)
        first = batch.lengths[0]
        base = self.model.get_base_model()
        ours = base.config._attn_implementation
        try:
            with torch.no_grad():
                packed = logits(self.model, batch)[first - 1 :].float()
                base.set_attn_implementation("eager")
                alone = self.model(input_ids=batch.ids[:, first:], use_cache=False).logits[0, :-1].float()
        except (TypeError, ValueError) as error:
            raise TrainChainError("model.unreadable", f"The model cannot train packed: {error}.") from None
        finally:
            base.set_attn_implementation(ours)
        off = float((packed - alone).abs().max() / alone.abs().max().clamp(min=1e-6))
        if not off <= (1e-3 if self._training.precision == "fp32" else 0.1):
            raise TrainChainError(
                "model.unreadable",
                f"The model does not keep packed documents apart (logits off by {off:.1e}).",
                hint="A model with state beyond attention cannot be trained packed; choose another base.",
            )


def _array(tensor: torch.Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.detach().float().cpu().numpy().copy()
    return array
