"""Make the golden segments that ship with the package: base, rows, start, and where each segment ends on this machine.

One seed decides base and rows; the ends have this machine's last bits. Run it with one thread:
OMP_NUM_THREADS=1 python benchmarks/golden.py
"""

import json

import numpy as np

from trainchain.core.adapter import tensor_bytes
from trainchain.core.segments import bf16, start_state, state_bytes
from trainchain.core.train import golden
from trainchain.core.train.device import set_modes

SEED, VOCABULARY, HIDDEN, ROWS = 7, 160, 48, 30
CONFIG = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": HIDDEN},
    **{"intermediate_size": 96, "num_hidden_layers": golden.LAYERS, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "rms_norm_eps": 1e-5},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": True, "dtype": "bfloat16"},
    **{"attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0, "initializer_range": 0.1},
}


def main() -> None:
    set_modes(1, 0)
    golden.BASE.mkdir(parents=True, exist_ok=True)
    (golden.BASE / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n", encoding="utf-8")
    (golden.BASE / "model.safetensors").write_bytes(base())
    golden.ROWS.write_text(json.dumps(rows()) + "\n", encoding="utf-8")
    documents = golden.documents()
    random = np.random.default_rng(SEED)
    initial = {
        name: (random.normal(0, 0.05, shape) if "lora_A" in name else np.zeros(shape)).astype(np.float32)
        for name, shape in golden.shapes().items()
    }
    begun = golden.replay(golden.model("fp32", documents), documents, start_state(initial), golden.BEFORE)
    golden.path_of(golden.START).write_bytes(state_bytes(begun))
    for precision in golden.PRECISIONS:
        model = golden.model(precision, documents)
        for cold in (True, False):
            end = golden.replay(model, documents, golden.start(cold=cold))
            golden.path_of(golden.name_of(precision, cold=cold)).write_bytes(state_bytes(end))


def base() -> bytes:
    """A random Llama whose numbers are bf16's."""
    random = np.random.default_rng(SEED)
    tensors = {"model.embed_tokens.weight": bf16(random.normal(0, 0.3, (VOCABULARY, HIDDEN)).astype(np.float32))}
    for target in golden.targets():
        shape = golden.SHAPES[target.rpartition(".")[2]]
        tensors[f"{target}.weight"] = bf16(random.normal(0, shape[1] ** -0.5, shape).astype(np.float32))
    norms = [f"model.layers.{layer}.{name}" for layer in range(golden.LAYERS) for name in
             ("input_layernorm.weight", "post_attention_layernorm.weight")]  # fmt: skip
    for name in ["model.norm.weight", *norms]:
        tensors[name] = bf16(np.ones(HIDDEN, np.float32))
    return tensor_bytes(tensors)


def rows() -> list[dict[str, object]]:
    """Little sums to learn: an answer repeats its question some places further on."""
    random = np.random.default_rng(SEED)
    found = []
    for _ in range(ROWS):
        size, shift = int(random.integers(8, 28)), int(random.integers(1, 5))
        question = random.integers(10, 150, size)
        found.append({"ids": [1, *question.tolist(), 3, *(question + shift).tolist(), 2], "answer": size + 2})
    return found


if __name__ == "__main__":
    main()
