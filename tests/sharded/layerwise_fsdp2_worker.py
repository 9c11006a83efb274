"""Fits under ModelParallelStrategy and layerwise_fsdp2, all in the same two processes; writes ``rank<n>.pt``.

``test_layerwise_fsdp2.py`` starts both and compares.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_optim import FSDP2Strategy, LayerwiseFSDP2Strategy
from tests.cases import case_of
from tests.layerwise_ddp_worker import Sent, monitored
from tests.models import LENGTH, TOKENS, LitTokens, loader, trainer
from tests.processes import EVERY

RANK = int(os.environ.get("LOCAL_RANK", 0))
WIDTH, BLOCKS = 32, 3

ACCUMULATED = "accumulation, norm clipping"
#: By name: the Trainer's flags, and the greatest difference; FSDP2 reduces every micro-batch and layerwise their sum.
SETTINGS: dict[str, tuple[dict[str, Any], float]] = {
    "plain": ({}, 0.0),
    "norm clipping": ({"gradient_clip_val": 0.03}, 0.0),
    "value clipping": ({"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, 0.0),
    "bf16": ({"precision": "bf16-true"}, 0.0),
    "accumulation": ({"accumulate_grad_batches": 3}, 1e-6),
    ACCUMULATED: ({"accumulate_grad_batches": 3, "gradient_clip_val": 0.03}, 1e-6),
}
COMPARED = [("adamw_torch", setting) for setting in SETTINGS] + [("sgd", ACCUMULATED)]
OURS = ["schedule_free_adamw", "adamw_anyprecision", "adafactor", "galore_adamw", "muon"]
if EVERY:
    OURS += ["schedule_free_sgd", "schedule_free_radam", "grokadamw", "lomo", "adalomo", "apollo_adamw", "scale"]
COMPARED += [(name, "norm clipping") for name in OURS]
#: For modules without ``configure_model``, and the dtype in which linear layers find their weights.
PRECISIONS = {"32-true": "float32", "bf16-mixed": "bfloat16", "16-mixed": "float16"}
BUCKETS = (0.0, 0.001, None)
#: The optimizers before and after the checkpoint in the middle, and whether it is a single file.
RESUMED = [
    ("adamw_torch", "adamw_torch_layerwise", False),
    ("adamw_torch_layerwise", "adamw_torch", True),
    # States that are spread unlike their parameter, or not at all.
    ("galore_adamw", "galore_adamw_layerwise", False),
    # At the average, while the model is whole in a file; at the training point in its state.
    ("schedule_free_adamw", "schedule_free_adamw_layerwise", True),
]
if EVERY:
    RESUMED += [
        ("adamw_torch", "adamw_torch_layerwise", True),
        ("adamw_torch_layerwise", "adamw_torch", False),
        *(("adamw_torch_layerwise", "adamw_torch_layerwise", whole_file) for whole_file in (False, True)),
        # Their states and groups hold integers, strings and None besides tensors.
        ("grokadamw", "grokadamw_layerwise", False),
        ("adamw_anyprecision_layerwise", "adamw_anyprecision", True),
        ("galore_adamw", "galore_adamw_layerwise", True),
        *(("adafactor_layerwise", "adafactor", whole_file) for whole_file in (False, True)),
        ("apollo_adamw", "apollo_adamw", True),
        ("muon", "muon_layerwise", False),
        ("schedule_free_adamw", "schedule_free_adamw_layerwise", False),
        ("schedule_free_radam_layerwise", "schedule_free_radam", False),
        ("schedule_free_sgd", "schedule_free_sgd", True),
    ]
#: Several as one: the optimizer of the ends of the model; the main one is AnyPrecision.
SEVERAL = {"model[.](0|4)[.].*": {"optim": "adamw_torch", "lr": 1e-3, "lr_scheduler": "cosine"}}
MAIN = "adamw_anyprecision"


class Sharded(LitTokens):
    """Blocks of equal size, each one sharded by itself."""

    reshards = True

    def __init__(self, **optim: Any) -> None:
        super().__init__(**optim)
        self.model = self.whole()

    @staticmethod
    def whole() -> nn.Sequential:
        """Returns the model, not sharded."""
        blocks = (nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(BLOCKS))
        return nn.Sequential(nn.Embedding(TOKENS, WIDTH), *blocks, nn.Linear(WIDTH, TOKENS))

    def configure_model(self) -> None:
        assert self.device_mesh is not None
        mesh = self.device_mesh["data_parallel"]
        for block in self.model:
            fully_shard(block, mesh=mesh, reshard_after_forward=self.reshards)
        fully_shard(self.model, mesh=mesh)


class KeepsGathered(Sharded):
    """What forward has gathered stays until backward, or, where there is none, until somebody lets it go."""

    reshards = False


class SaysNothing(LitTokens):
    """The same model, without ``configure_model``; it notes in which dtype layers find their weights."""

    def __init__(self, **optim: Any) -> None:
        super().__init__(**optim)
        self.model = Sharded.whole()
        self.model[2].append(nn.BatchNorm1d(LENGTH))
        self.seen: dict[str, str] = {}
        for layer in self.model.modules():
            if isinstance(layer, (nn.Linear, nn.BatchNorm1d)):
                layer.register_forward_pre_hook(self._note)

    def _note(self, layer: nn.Module, inputs: Any) -> None:
        # FSDP2 gives a module that it shards a class of its own.
        kind = nn.Linear if isinstance(layer, nn.Linear) else nn.BatchNorm1d
        self.seen[kind.__name__] = str(next(layer.parameters()).dtype)


class SaysHow(SaysNothing):
    """The same with ``configure_model``, and no word of precision."""

    configure_model = Sharded.configure_model
    reshards = True


class Watch(Callback):
    """Notes the whole weights at the end, what every batch sent, and the most gradient bytes alive in this process."""

    def __init__(self) -> None:
        self.reduced: list[int] = []
        self.norms: list[Tensor | None] = []
        self.peak = 0
        self.weights: dict[str, Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        parameters = list(pl_module.parameters())

        def see(_: Tensor) -> None:
            alive = [p.grad for p in parameters if p.grad is not None]
            self.peak = max(self.peak, sum(gradient.to_local().nbytes for gradient in alive))

        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(see)

    def on_train_batch_start(self, *_: Any) -> None:
        Sent.count = 0

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.reduced.append(Sent.count)
        self.norms.append(trainer.callback_metrics.get("grad_norm"))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for name, parameter in pl_module.named_parameters():
            assert isinstance(parameter, DTensor)
            self.weights[name] = parameter.full_tensor().detach()


def fit(
    name: str,
    options: dict[str, Any] | None = None,
    save: Path | None = None,
    checkpoint: Path | None = None,
    whole_file: bool = False,
    strategy: type[ModelParallelStrategy] | None = None,
    callbacks: tuple[Callback, ...] = (),
    param_groups: dict[str, Any] | None = None,
    validation: Any = None,
    kind: type[LitTokens] = Sharded,
    **flags: Any,
) -> dict[str, Any]:
    """Trains eight steps, from a checkpoint if there is one; returns what was noted, or the error."""
    layerwise = name.endswith("_layerwise")
    case = case_of(name)
    torch.manual_seed(0 if checkpoint is None else 1)
    model = kind(
        optim=name,
        lr=case.lr,
        weight_decay=0.1,
        lr_scheduler=case.schedule,
        optim_args={**case.options, **(options or {})},
        param_groups=param_groups,
        optim_target_modules="all-linear" if case.projects else None,
    )
    watch = Watch()
    callbacks = watch, *callbacks
    if save is not None:
        callbacks = *callbacks, ModelCheckpoint(save, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    strategy = strategy or (LayerwiseFSDP2Strategy if layerwise else ModelParallelStrategy)
    # Lightning's default would make the two processes a tensor-parallel group; ours shard.
    sizes = {"data_parallel_size": 2, "tensor_parallel_size": 1} if strategy is ModelParallelStrategy else {}
    run = trainer(
        max_steps=8,
        strategy=strategy(**sizes, save_distributed_checkpoint=not whole_file),
        devices=2,
        callbacks=list(callbacks),
        enable_checkpointing=save is not None,
        **flags,
    )
    try:
        run.fit(model, loader(8), validation, ckpt_path=checkpoint)
    except ValueError as error:
        return {"error": type(error).__name__, "text": str(error)}
    return {"steps": run.global_step, **{key: getattr(watch, key) for key in ("weights", "reduced", "norms", "peak")}}


class Seen(Callback):
    """Keeps what a module noted of its layers."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, SaysNothing)
        self.dtypes = pl_module.seen


class Points(Callback):
    """Compares the sharded model's outputs with those of a whole one that has the parameters' values."""

    def __init__(self) -> None:
        self.apart: dict[str, list[float]] = {"train": [], "validation": []}
        self.weights: dict[str, list[Tensor]] = {"train": [], "validation": []}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Afterwards the module has gathered ones from forward to backward.
        self.shards = list(pl_module.parameters())

    @torch.no_grad()
    def _compare(self, when: str, module: L.LightningModule, batch: Any) -> None:
        whole = Sharded.whole()
        for parameter, shard in zip(whole.parameters(), self.shards, strict=True):
            assert isinstance(shard, DTensor)
            parameter.copy_(shard.full_tensor())
        self.weights[when].append(next(whole.parameters()).detach().clone())
        tokens = batch[0] if isinstance(batch, (list, tuple)) else batch
        self.apart[when].append(float((whole(tokens) - module.model(tokens)).abs().max()))  # type: ignore[operator]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._compare("train", pl_module, batch)

    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *_: Any) -> None:
        self._compare("validation", pl_module, batch)


def points(name: str) -> dict[str, Any]:
    """Trains and validates in turn; returns how far outputs are from those of the weights, and the weights."""
    seen = Points()
    flags = {"validation": loader(2, seed=1), "val_check_interval": 2, "num_sanity_val_steps": 0}
    found = fit(name, callbacks=(seen,), kind=KeepsGathered, **flags)
    return {**found, "apart": seen.apart, "points": seen.weights}


def both(name: str, options: dict[str, Any] | None = None, **kwargs: Any) -> dict[str, dict[str, Any]]:
    """Fits plainly and layer by layer, the latter with ``options``."""
    return {"plain": fit(case_of(name).plain, **kwargs), "layerwise": fit(f"{name}_layerwise", options, **kwargs)}


def alone(precision: str) -> dict[str, Any]:
    """Fits a module without ``configure_model`` after and in backward, and one that shards itself in the same way."""
    kinds = {"by hand": (SaysHow, ModelParallelStrategy, ""), "plain": (SaysNothing, FSDP2Strategy, "")}
    found = {}
    for form, (kind, strategy, suffix) in {**kinds, "layerwise": (SaysNothing, None, "_layerwise")}.items():
        flags: dict[str, Any] = {"precision": precision}
        if precision == "16-mixed":
            # Lightning takes bfloat16 on a CPU unless it gets the plugin. The first steps overflow.
            scaler = GradScaler("cpu", init_scale=2.0**20)
            flags = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}
        options = {"overflow": "skip_step"} if suffix and precision == "16-mixed" else None
        seen = Seen()
        run = fit(f"adamw_torch{suffix}", options, strategy=strategy, kind=kind, callbacks=(seen,), **flags)
        found[form] = {**run, "seen": seen.dtypes, "scale": scaler.get_scale() if precision == "16-mixed" else None}
    return found


def several(directory: Path, **flags: Any) -> dict[str, Any]:
    """Fits several optimizers as one in both forms, and each from the other's checkpoint, in shards and as a file."""
    found = {}
    for first, second, whole in ((MAIN, f"{MAIN}_layerwise", True), (f"{MAIN}_layerwise", MAIN, False)):
        saved = directory / f"several, {first}"
        found[first] = fit(first, save=saved, whole_file=whole, **flags)
        found[f"{second}, resumed"] = fit(second, checkpoint=saved / "step=4.ckpt", whole_file=whole, **flags)
    return found


def runs(directory: Path) -> Iterator[tuple[str, Any]]:
    """Yields every run by name."""
    for name, setting in COMPARED:
        yield f"{name}, {setting}", both(name, **SETTINGS[setting][0])
    for bucket_mb in BUCKETS:
        yield f"bucket_mb={bucket_mb}", both("adamw_torch", {"bucket_mb": bucket_mb})
    yield "log_grad_norm", fit("adamw_torch_layerwise", {"log_grad_norm": True})
    names, clipped = ("adamw_torch", "adamw_torch_layerwise"), SETTINGS["norm clipping"][0]
    yield "monitor", {name: monitored(fit, name, **clipped) for name in names}
    yield "plain strategy", fit("adamw_torch_layerwise", strategy=ModelParallelStrategy)
    flags = SETTINGS["norm clipping"][0]
    yield "norm_budget_mb", fit("adamw_torch_layerwise", {"norm_budget_mb": 1}, **flags)
    for precision in PRECISIONS:
        yield f"without configure_model, {precision}", alone(precision)
    yield "points", {name: points(name) for name in ("schedule_free_adamw", "schedule_free_adamw_layerwise")}
    yield "several optimizers", several(directory, param_groups=SEVERAL, **flags)
    for first, second, whole_file in RESUMED:
        saved = directory / f"{first}, {whole_file}"
        if not saved.exists():
            fit(first, save=saved, whole_file=whole_file, **flags)
        checkpoint = saved / "step=4.ckpt"
        yield f"{first}, {second}, {whole_file}", fit(second, checkpoint=checkpoint, whole_file=whole_file, **flags)


if __name__ == "__main__":
    for name in ("reduce_scatter_tensor", "reduce_scatter_single"):  # its name differs between versions
        if hasattr(dist, name):
            setattr(dist, name, Sent.counting(getattr(dist, name)))
    torch.save(dict(runs(Path(sys.argv[1]))), Path(sys.argv[1]) / f"rank{RANK}.pt")
