"""Every fast way computes what PEFT and transformers compute; memory stays bounded."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.integration.train.conftest import Job
from tests.integration.train.test_trainer import some_adapter
from trainchain.core.train import fused
from trainchain.core.train.head import ModelHead, TiledHead, _TiledLoss, select
from trainchain.core.train.packed import _varlen, deal, lay_out, micro_batch, split
from trainchain.core.train.trainer import Engine

LEASE = "0x" + "ab" * 32
CPU = torch.device("cpu")
MakeJob = Callable[..., Job]


def gradient(engine: Engine, rows: list[int]) -> torch.Tensor:
    model = engine._adapted
    model._gradients.zero_()
    model.loss_sum(micro_batch(engine.documents, rows, CPU)).backward()
    return model._gradients.double()


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_fused_gradients_are_pefts(make_job: MakeJob) -> None:
    job = make_job()
    ours, peft = job.engine(), make_job(adapter_path="peft").engine()
    adapter, rows = some_adapter(job), [0, 5, 3, 8, 1]
    for engine in (ours, peft):
        engine._adapted.begin(adapter)

    assert (ours._adapted.adapter_path, peft._adapted.adapter_path) == ("fused", "peft")
    assert "/fused" in ours.numeric_class
    assert "/peft" in peft.numeric_class
    assert off(gradient(ours, rows), gradient(peft, rows)) < 1e-6
    by_tensor = zip(gradient(ours, rows).split(ours._adapted._sizes), peft._adapted._sizes, strict=True)
    wanted = gradient(peft, rows).split(peft._adapted._sizes)
    assert all(off(part, want) < 2e-6 for (part, _), want in zip(by_tensor, wanted, strict=True))


def test_a_fused_path_that_is_wrong_falls_back_to_peft(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = fused._Adapted.backward

    def twice(ctx: Any, *gradients: torch.Tensor) -> Any:
        return tuple(None if each is None else 2 * each for each in wrong(ctx, *gradients))

    monkeypatch.setattr(fused._Adapted, "backward", staticmethod(twice))
    engine = make_job().engine()

    assert engine._adapted.adapter_path == "peft"
    assert engine.numeric_class.endswith("/peft")
    assert not any("forward" in vars(module) for module in engine._adapted.model.modules())


def test_linears_with_one_input_share_one_product(make_job: MakeJob) -> None:
    model = make_job().engine()._adapted.model
    layer = model.get_base_model().model.layers[0]
    groups = {
        name: module.forward._group
        for name, module in layer.named_modules()
        if isinstance(getattr(module, "forward", None), fused._Member)
    }

    assert groups["self_attn.q_proj"] is groups["self_attn.k_proj"] is groups["self_attn.v_proj"]
    assert groups["mlp.gate_proj"] is groups["mlp.up_proj"]
    assert len({id(group) for group in groups.values()}) == 4
    q, k = layer.self_attn.q_proj.base_layer.weight, layer.self_attn.k_proj.base_layer.weight
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()


@pytest.mark.parametrize("tokens", [16, 64, 100, 10_000])
def test_any_split_gives_the_same_gradient(make_job: MakeJob, tokens: int) -> None:
    job = make_job()
    engine = job.engine()
    engine._adapted.begin(some_adapter(job))
    rows = list(range(12))
    whole = gradient(engine, rows)

    model = engine._adapted
    model._gradients.zero_()
    groups = split(engine.documents.lengths(), rows, tokens)
    for group in groups:
        model.loss_sum(micro_batch(engine.documents, group, CPU)).backward()

    assert [row for group in groups for row in group] == rows
    assert all(len(group) == 1 or sum(len(engine.documents.ids[row]) for row in group) <= tokens for group in groups)
    assert off(model._gradients.double(), whole) < 1e-6


@given(st.lists(st.integers(1, 64), min_size=1, max_size=40), st.integers(1, 200), st.integers(1, 5), st.randoms())
def test_rows_are_dealt_once_each_and_evenly(lengths: list[int], budget: int, hands: int, random: Random) -> None:
    rows = list(range(len(lengths)))
    random.shuffle(rows)

    dealt = deal(lengths, rows, budget, hands)

    groups = [group for hand in dealt for group in hand]
    assert len(dealt) == hands
    assert sorted(row for group in groups for row in group) == sorted(rows)
    assert all(groups)
    assert all(len(group) == 1 or sum(lengths[row] for row in group) <= budget for group in groups)
    assert all(group == sorted(group, key=rows.index) for group in groups)
    sums = [sum(lengths[row] for row in group) for group in groups]
    assert max(sums) - min(sums) <= max(lengths)
    assert deal(lengths, rows, budget, hands) == dealt


@pytest.mark.parametrize("adapter_path", ["fused", "peft"])
def test_lanes_are_one_model(make_job: MakeJob, adapter_path: str) -> None:
    """Two threads, each through the whole model: the same mathematics, and the same bytes whoever is first."""
    job = make_job(adapter_path=adapter_path, steps=6, segment_steps=2, batch_size=8, micro_batch_size=8, rounds=1)
    single = job.engine().train(job.start, 1, 0, LEASE)
    engine = Engine(job.recipe, job.model, job.data, threads=2)
    model = engine._adapted
    loss = engine.evaluate(some_adapter(job))

    results = [engine.train(job.start, 1, 0, LEASE) for _ in range(3)]
    results.append(Engine(job.recipe, job.model, job.data, threads=2).train(job.start, 1, 0, LEASE))

    assert model.lanes == 2
    assert all(result.leaves == results[0].leaves for result in results)
    assert results[0].losses == pytest.approx(single.losses, rel=1e-5)
    assert "threads2" in results[0].numeric_class
    assert loss == pytest.approx(job.engine().evaluate(some_adapter(job)), rel=1e-6)
    mine, its = (lane.head._output.weight for lane in model._lanes)
    assert mine is its
    frozen = {id(parameter) for parameter in model.base.parameters() if not parameter.requires_grad}
    twin = model._lanes[1].head._decoder
    assert {id(parameter) for parameter in twin.parameters() if not parameter.requires_grad} <= frozen
    assert Engine(job.recipe, job.model, job.data, threads=16)._adapted.lanes == 8 * 96 // 256
    assert Engine(job.recipe, job.model, job.data, threads=16, micro_tokens=300)._adapted.lanes == 1


def test_checkpointing_changes_no_bit(make_job: MakeJob) -> None:
    job = make_job()
    plain = job.engine().train(job.start, 1, 0, LEASE)

    engine = Engine(job.recipe, job.model, job.data, threads=1, checkpointing=True)
    result = engine.train(job.start, 1, 0, LEASE)

    assert result.leaves == plain.leaves
    assert not engine._adapted.base.training


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tile", [3, 7, 100])
def test_the_tiled_loss_is_cross_entropy(tile: int, bias: bool, softcap: float | None) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(17, 8, dtype=torch.float64, requires_grad=True)
    weight, offset = torch.randn(50, 8, dtype=torch.float64), torch.randn(50, dtype=torch.float64) if bias else None
    labels = torch.randint(50, (17,))
    z = torch.nn.functional.linear(hidden, weight, offset) * 0.5
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    wanted = torch.nn.functional.cross_entropy(z, labels, reduction="sum")
    (want,) = torch.autograd.grad(wanted * 3, hidden)

    single = hidden.detach().float().requires_grad_()
    parts = (weight.float(), None if offset is None else offset.float())
    found = _TiledLoss.apply(single, *parts, labels, 0.5, softcap, tile)
    (found * 3).backward()

    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    assert off(single.grad.double(), want) < 1e-6
    with torch.no_grad():
        assert float(_TiledLoss.apply(single, *parts, labels, 0.5, softcap, tile)) == float(found.detach())


def test_selecting_rows_gives_the_gradient_back_to_them_alone() -> None:
    x = torch.randn(6, 3, requires_grad=True)
    rows = torch.tensor([4, 0, 5])

    select(x, rows).mul(2).sum().backward()

    assert torch.equal(x.grad, torch.zeros(6, 3).index_fill_(0, rows, 2.0))


def test_the_last_layer_runs_where_somebody_scores(make_job: MakeJob) -> None:
    engine = make_job().engine()
    model = engine._adapted
    batch = micro_batch(engine.documents, [0, 1, 2], CPU)
    seen: list[int] = []
    mlp = model.base.model.layers[-1].mlp
    hook = mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))

    with torch.no_grad():
        found = model.logits(batch)
        hook.remove()
        wanted = ModelHead(model.base).logits(batch)

    assert isinstance(model._lanes[0].head, TiledHead)
    assert seen == [len(batch.labels)]
    assert len(batch.labels) < batch.tokens
    assert float((found - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


def attention_by_hand(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, *_: Any, scale: float, **kwargs: Any
) -> torch.Tensor:
    """What the flash kernel is documented to compute; (tokens, heads, width)."""
    assert kwargs["enable_gqa"]
    left, right = kwargs["window_size"]
    assert right == 0
    k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for each in (k, v))
    parts = []
    for a, b in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q[a:b], k[a:b]) * scale
        back = torch.arange(b - a)[:, None] - torch.arange(b - a)[None]
        allowed = (back >= 0) & ((back <= left) if left >= 0 else True)
        parts.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~allowed, -torch.inf).softmax(-1), v[a:b]))
    return torch.cat(parts)


@pytest.mark.parametrize("window", [None, 4])
def test_the_varlen_kernel_is_called_as_it_is_documented(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    """No CUDA here: the layout is tested against the kernel's documented meaning, not against the kernel."""
    from transformers import AttentionInterface

    kernel = AttentionInterface()["trainchain_sdpa"]
    batch = lay_out([(np.arange(n), np.ones(n, np.bool_)) for n in (7, 3, 9)], CPU)
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 19, 8), torch.randn(1, 2, 19, 8), torch.randn(1, 2, 19, 8)
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    more = {"scaling": 0.3, "sliding_window": window, "document_lengths": batch.lengths}
    wanted, _ = kernel(module, q, k, v, None, **more)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", attention_by_hand)
    found, _ = _varlen(module, q, k, v, None, document_bounds=batch.bounds, **more)

    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) < 1e-5


PEAK = """
import re, sys
from pathlib import Path
import torch
from trainchain.core.train.head import _TiledLoss
torch.set_num_threads(1)
n, width, vocabulary = 4096, 16, 32768
hidden = torch.randn(n, width, requires_grad=True)
weight, labels = torch.randn(vocabulary, width), torch.randint(vocabulary, (n,))
if sys.argv[1] == "tiled":
    _TiledLoss.apply(hidden, weight, None, labels, 1.0, None, 256).backward()
else:
    torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="sum").backward()
print(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1)) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read as Linux reports it")
def test_the_logits_of_a_long_sequence_are_never_whole() -> None:
    def peak(kind: str) -> int:
        return int(subprocess.check_output([sys.executable, "-c", PEAK, kind], timeout=120))

    logits = 4096 * 32768 * 4 // 2**20

    assert peak("whole") - peak("tiled") > 0.75 * logits


def test_nothing_else_in_a_step_grows_with_the_vocabulary(make_job: MakeJob) -> None:
    """The largest tensor of a step, forward and back, is a tile or smaller."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            found = function(*args, **(kwargs or {}))
            for each in found if isinstance(found, tuple | list) else [found]:
                if isinstance(each, torch.Tensor) and each.dim() == 2 and each.shape[1] == 320:
                    largest = max(largest, each.shape[0])
            return found

    job = make_job(sequence_len=256)
    engine = job.engine()
    rows = list(range(20))
    batch = micro_batch(engine.documents, rows, CPU)
    with Watch():
        engine._adapted.loss_sum(batch).backward()

    assert len(batch.labels) > 256
    assert largest == 256


def test_more_than_one_process_trains_the_same_shard(make_job: MakeJob, tmp_path: Path) -> None:
    import json

    from trainchain.core.adapter import adapter_bytes, read_adapter

    job = make_job(steps=4, segment_steps=2)
    single = job.engine().train(job.start, 1, 0, LEASE)
    (tmp_path / "recipe.json").write_bytes(job.recipe.canonical())
    (tmp_path / "start.safetensors").write_bytes(adapter_bytes(job.start))
    data = {digest: str(path) for digest, path in job.data.items()}
    requests = [
        {"op": "open", "recipe": str(tmp_path / "recipe.json"), "model_dir": str(job.model), "data": data},
        {
            "op": "train",
            "start": str(tmp_path / "start.safetensors"),
            "round": 1,
            "shard": 0,
            "lease": LEASE,
            "out": str(tmp_path / "out"),
            "states": str(tmp_path / "states"),
        },
    ]
    command = [sys.executable, "-m", "trainchain.core.train", "--threads", "1", "--processes", "2"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write("".join(json.dumps(request) + "\n" for request in requests))
        child.stdin.flush()
        events = []
        for line in child.stdout:
            events.append(json.loads(line))
            if events[-1]["event"] in ("done", "error"):
                break
        child.stdin.close()
        child.wait(timeout=60)

    done = events[-1]
    assert done["event"] == "done", done
    assert done["numeric_class"].endswith("/processes2")
    assert done["losses"] == pytest.approx(single.losses[:2], rel=1e-5)
    delta = read_adapter(Path(done["delta"]))
    a, b = (np.concatenate([part.ravel() for _, part in sorted(x.items())]) for x in (delta, single.delta))
    assert float(np.linalg.norm(a - b) / np.linalg.norm(b)) < 1e-3
