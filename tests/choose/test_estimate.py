"""What is asked of an estimate: nothing is allocated, options count, and what cannot be estimated is refused."""

from __future__ import annotations

import doctest
import functools
import importlib
import resource
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_optim import (
    IncompatibleTrainer,
    InvalidOption,
    OptimConfig,
    Shape,
    compare_memory,
    estimate_memory,
)
from lightning_optim._compat.fake import fake_tensors
from lightning_optim.choose import SHAPES, Estimator, MemoryTracker, Transformer, find_shape
from lightning_optim.choose import _temporaries as temporaries
from lightning_optim.table import REGISTRY
from tests.cases import BY_NAME, KINDS
from tests.choose.real import LitText, tokens
from tests.models import LitTokens

DEEP = Shape("llama", hidden=64, layers=6, heads=4, intermediate=96, vocab=128, length=32, kv_heads=2)
SMALL = Shape("llama", hidden=64, layers=2, heads=4, intermediate=96, vocab=128, length=32, kv_heads=2)
MIB = 2**20


def test_an_8b_is_estimated_without_its_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    estimate = estimate_memory("llama3-8b", "adamw_torch", precision="bf16-true")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024
    # 8.03 billion parameters: https://arxiv.org/abs/2407.21783.
    assert round(estimate.parameters / 2 / 1e9, 2) == 8.03
    assert estimate.gradients == estimate.parameters
    # And the 4 bytes of each parameter's count of steps.
    assert estimate.state == 2 * estimate.parameters + 4 * 291
    assert estimate.activations is None


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        # The GaLore paper's names, and the counts of the others' papers.
        *(("llama-60m", 58), ("llama-130m", 134), ("llama-350m", 368), ("llama-1b", 1339)),
        *(("llama-7b", 6738), ("llama-13b", 13016), ("llama-70b", 68977)),
        *(("gpt2", 124), ("gpt2-xl", 1558), ("bert-base", 109), ("vit-b", 87), ("vit-l", 304)),
    ],
)
def test_shapes_have_the_parameters_of_their_papers(name: str, millions: int) -> None:
    with torch.device("meta"):
        model = Transformer(find_shape(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(millions * 1e6, rel=0.01)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "vit"])
def test_shapes_train(kind: Any) -> None:
    shape = Shape(kind, hidden=32, layers=2, heads=2, intermediate=64, vocab=50, length=197)
    model = Transformer(shape, activation_checkpointing=True)
    inputs = torch.randn(2, 3, 224, 224) if kind == "vit" else torch.randint(50, (2, 16))
    model(inputs).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert {find_shape(name).kind for name in SHAPES} == {"llama", "gpt2", "bert", "vit"}


def test_the_module_is_left_alone() -> None:
    model = LitText()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    estimate_memory(model, "adamw_torch", batch=tokens(2), precision="bf16-true")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(type(parameter) is nn.Parameter and parameter.grad is None for parameter in model.parameters())
    assert model._trainer is None


def test_nothing_of_an_estimate_stays_behind_for_real_optimizers() -> None:
    """bitsandbytes' table of codes is cached: made for an estimate, it would be one without values."""
    estimate_memory(LitTokens(), "galore_adamw_8bit", optim_args="rank=8,min_8bit_size=1")
    model = LitTokens(optim="galore_adamw_8bit", optim_args="rank=8,min_8bit_size=1")
    optimizer = model.configure_optimizers()
    before = model.model.linear.weight.clone()
    model.model.linear.weight.grad = torch.ones(64, 64)
    optimizer.step()  # type: ignore[union-attr]
    assert (model.model.linear.weight != before).all()


def test_what_costs_and_what_saves() -> None:
    @functools.cache
    def peak(optim: str = "adamw_torch_fused", **setting: Any) -> int:
        return estimate_memory(SMALL, optim, **{"batch": (4, 32), **setting}).peak

    plain = peak()
    assert peak(batch=(8, 32)) > plain
    assert peak(activation_checkpointing=True) < plain
    assert peak(precision="bf16-true") < 0.7 * plain
    assert peak(accumulate_grad_batches=2) > plain
    assert peak(devices=2) > plain, "the buckets of DistributedDataParallel"
    layerwise = peak("adamw_torch_fused_layerwise", activation_checkpointing=True)
    assert layerwise < peak(activation_checkpointing=True)
    clipped = peak("adamw_torch_fused_layerwise", gradient_clip_val=1.0)
    assert clipped > peak("adamw_torch_fused_layerwise"), "the backward that measures keeps activations"
    part = {".*head.*": {"optim": "adamw_torch_fused", "clip": {"norm": 1.0}}}
    by_part = estimate_memory(SMALL, "adamw_torch_fused_layerwise", batch=(4, 32), param_groups=part)
    assert by_part.peak == clipped, "a part's own clipping by norm measures, too"
    by_last = peak("adamw_torch_fused_layerwise", optim_args="norm_clipping=previous", gradient_clip_val=1.0)
    assert by_last == peak("adamw_torch_fused_layerwise")


def test_layerwise_frees_gradients_also_over_processes() -> None:
    for devices in (1, 2):
        estimate = estimate_memory(
            SMALL, "adamw_torch_layerwise", optim_args="bucket_mb=0", batch=(1, 8), devices=devices
        )
        largest = 128 * 64 * 4
        # Over processes the next one arrives while one is on its way.
        assert largest <= estimate.gradients <= devices * largest + 64
        assert estimate.strategy == ("layerwise", "layerwise_ddp")[devices - 1]


@pytest.fixture(scope="module")
def deep() -> Estimator:
    return Estimator(DEEP, precision="bf16-true")


@pytest.mark.parametrize("name", [name for name in KINDS if "cuda" not in REGISTRY[BY_NAME[name].built].in_place])
def test_temporaries_of_many_parameters_are_those_of_all_of_them(
    name: str, deep: Estimator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are counted by kinds of parameters, without stepping each."""

    def measured(threshold: int) -> int | None:
        monkeypatch.setattr(temporaries, "_STEPPED", threshold)
        deep._temporaries.clear()
        return deep.estimate(OptimConfig(name)).temporaries

    assert measured(8) == pytest.approx(measured(10**6), rel=0.02, abs=2**12)


def test_comparing_sorts_and_leaves_out_what_cannot_train() -> None:
    estimates = compare_memory(SMALL, precision="16-true")
    names = [estimate.optim for estimate in estimates]
    assert [estimate.peak for estimate in estimates] == sorted(estimate.peak for estimate in estimates)
    assert {"sgd", "sgd_layerwise", "lomo", "galore_adamw_8bit_layerwise", "adamw_apex_fused"} <= set(names)
    # Its epsilon is zero in float16.
    assert "adamw_torch" not in names
    assert not {"adamw_torch_xla", "adamw_8bit", "adamw"} & set(names)
    assert [estimate.optim for estimate in compare_memory(SMALL, ["sgd", "lion_8bit"])] == ["sgd", "lion_8bit"]


def test_paged_states_may_leave_the_device() -> None:
    paged, plain = (estimate_memory(SMALL, name) for name in ("paged_adamw_8bit", "adamw_8bit"))
    assert (paged.peak, paged.pageable) == (plain.peak, paged.state)
    assert (paged.resident, plain.resident) == (paged.peak - paged.state, plain.peak)
    assert estimate_memory(SMALL, "paged_adamw_8bit", accelerator="cpu").pageable == 0


class Manual(LitText):
    automatic_optimization = False


class Values(LitText):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return super().training_step(batch[batch.nonzero()[:, 0]], batch_idx)


class NoLoss(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def training_step(self, batch: Tensor) -> dict[str, Tensor]:
        return {"output": self.layer(batch)}


class Uncopied(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)
        self.stream = (number for number in range(3))


@pytest.mark.parametrize(
    ("model", "setting", "error", "text"),
    [
        (Manual, {}, IncompatibleTrainer, "optimizes manually"),
        (Values, {}, IncompatibleTrainer, "depends on values"),
        (NoLoss, {"batch": torch.ones(2, 4)}, InvalidOption, "returned dict, and a tensor that depends on parameters"),
        (Uncopied, {"batch": torch.ones(2, 4)}, InvalidOption, "Uncopied cannot be copied"),
        (lambda: nn.LazyLinear(4), {}, InvalidOption, "has no shape yet"),
        (lambda: "llama-8b", {}, InvalidOption, "no shape 'llama-8b'; known are 'llama3-8b'"),
        (lambda: 3, {}, InvalidOption, "not of int"),
        (lambda: SMALL, {"batch": 3}, InvalidOption, r"batch=\(8, 2048\)"),
        (lambda: "gpt2", {"batch": (1, 2000)}, InvalidOption, "more tokens than the 1024 positions"),
        (LitText, {"activation_checkpointing": True}, InvalidOption, "is for shapes"),
        (LitText, {"precision": "transformer-engine"}, InvalidOption, "'bf16-true'"),
        (LitText, {"accelerator": "tpu"}, InvalidOption, "'cuda', 'cpu'"),
        (LitText, {"devices": 0}, InvalidOption, "devices=0 is no whole number"),
        (LitText, {"strategy": "layerwise", "devices": 2}, InvalidOption, "use 'layerwise_ddp'"),
        (LitText, {"strategy": "layerwise_ddp", "devices": 2}, IncompatibleTrainer, "use strategy='ddp'"),
        (LitText, {"optim": "adamw_torch_xla"}, IncompatibleTrainer, "runs on 'xla', not on 'cuda'"),
        (LitText, {"optim": "sgd", "precision": "16-true", "rank": 3}, InvalidOption, "rank"),
    ],
)
def test_what_cannot_be_estimated_says_what_to_do(model: Any, setting: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        estimate_memory(model(), **{"batch": tokens(2), **setting})


def test_a_loss_of_ones_own_takes_the_place_of_training_step() -> None:
    def loss(module: Any, batch: Tensor) -> Tensor:
        hidden = module.blocks(module.embedding(batch) + module.positions)
        return F.cross_entropy(module.head(hidden).flatten(0, 1).float(), batch.flatten())

    own, manual = (
        estimate_memory(kind(), batch=tokens(2), loss=how) for kind, how in ((LitText, None), (Manual, loss))
    )
    assert manual.peak == pytest.approx(own.peak, rel=1e-4)


def test_the_tracker_of_real_runs_counts_tensors_without_memory_alike() -> None:
    def step() -> MemoryTracker:
        model = Transformer(SMALL)
        inputs = torch.zeros(2, 16, dtype=torch.int64)
        with MemoryTracker() as tracker:
            model(inputs).backward()
        return tracker

    real = step()
    with fake_tensors():
        fake = step()
    assert fake.peak.total == real.peak.total


@pytest.mark.parametrize("module", ["_estimate", "_tracker"])
def test_examples_in_docstrings_run(module: str) -> None:
    found = doctest.testmod(importlib.import_module(f"lightning_optim.choose.{module}"))
    assert found.attempted > 0
    assert not found.failed


class Drops(nn.Module):
    """Attention and layers with dropout, run again in backward if asked."""

    def __init__(self, again: bool = False) -> None:
        super().__init__()
        self.again = again
        self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 64)
        self.dropout = nn.Dropout(0.1)

    def forward(self, hidden: Tensor) -> Tensor:
        for _ in range(3):
            hidden = checkpoint(self._layer, hidden, use_reentrant=False) if self.again else self._layer(hidden)
        return hidden

    def _layer(self, hidden: Tensor) -> Tensor:
        heads = self.up(hidden).unflatten(-1, (4, 16)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.1)
        return hidden + self.dropout(self.down(mixed.transpose(1, 2).flatten(2)))


def test_dropout_keeps_what_it_keeps_on_cuda_unless_forward_runs_again() -> None:
    hidden = torch.empty(2, 128, 64)
    cuda, cpu = (estimate_memory(Drops(), "sgd", batch=hidden, accelerator=kind) for kind in ("cuda", "cpu"))
    # A CPU keeps the scores of attention where they are dropped.
    scores = 3 * 2 * 4 * 128 * 128 * 4
    assert cuda.activations is not None
    assert cpu.activations is not None
    assert cuda.activations < cpu.activations - scores
    again = estimate_memory(Drops(again=True), "sgd", batch=hidden)
    assert again.activations is not None
    # There it is estimated as on a CPU.
    assert again.activations < cpu.activations
