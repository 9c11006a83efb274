"""Trains a cell in every way that an oracle needs, and says what came of it.

Three oracles. *Other*: the other form, plain or stepped during backward, ends with the same weights. *Split*: a fresh
process that goes on from a checkpoint of the middle ends with the same weights and states. *Control*: plain Lightning
with the upstream class, nothing of lightning_optim, ends with the same weights where it does the same; and where a cell
fails, it tells what is Lightning's own doing.
"""

from __future__ import annotations

import hashlib
import json
import os
import traceback
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import get_scheduler

from lightning_optim import errors
from tests.stress.axes import Cell
from tests.stress.modules import Named, Trains, Upstream

OURS = tuple(kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception))
Outcome = dict[str, Any]
#: Names of the ways to train.
WHOLE, OTHER, CONTROL, SPLIT = "whole", "other", "control", "split"

_PLATEAU = {"monitor": "val_loss", "factor": 0.5, "patience": 0, "threshold": 1e9}
_CLIPPING: dict[str, dict[str, Any]] = {
    "none": {},
    "norm": {"gradient_clip_val": 0.1},
    "value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "tiny norm": {"gradient_clip_val": 1e-6},
    "tiny value": {"gradient_clip_val": 1e-9, "gradient_clip_algorithm": "value"},
    "huge norm": {"gradient_clip_val": 1e9},
}
_HALF = {"bf16-true": torch.bfloat16, "16-true": torch.float16}
_FLAGS: dict[str, dict[str, Any]] = {
    "none": {},
    "detect_anomaly": {"detect_anomaly": True},
    "overfit_batches": {"overfit_batches": 2},
    "fast_dev_run": {"fast_dev_run": 2},
    "barebones": {"barebones": True},
    "max_time": {"max_time": {"hours": 1}},
    "val_check_interval": {"val_check_interval": 2},
    "reload_dataloaders": {"reload_dataloaders_every_n_epochs": 1},
}
_CALLBACKS: dict[str, Callable[[], Callback]] = {
    "EMA": partial(EMAWeightAveraging, decay=0.8),
    "SWA": partial(StochasticWeightAveraging, swa_lrs=1e-3, swa_epoch_start=1),
    "BackboneFinetuning": partial(
        BackboneFinetuning, 1, lambda epoch: 2.0, backbone_initial_lr=1e-3, should_align=False, train_bn=True
    ),
    "LearningRateFinder": partial(
        LearningRateFinder, num_training_steps=15, early_stop_threshold=None, min_lr=1e-5, max_lr=1e-2
    ),
    "BatchSizeFinder": partial(BatchSizeFinder, init_val=2, max_trials=2, steps_per_trial=1),
    "GradientAccumulationScheduler": partial(GradientAccumulationScheduler, {0: 1, 1: 2}),
    "EarlyStopping": partial(
        EarlyStopping, "train_loss", patience=0, mode="max", check_on_train_epoch_end=True, verbose=False
    ),
}


class Watch(Callback):
    """Notes how many batches began."""

    batches = 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.batches += 1


# --- what to train ---------------------------------------------------------------------------------------------------


def other_form(cell: Cell) -> tuple[str, str] | None:
    """Returns identifier and strategy of the run that must end with the same weights, or ``None``."""
    case = cell.case
    family = {"ddp": "ddp", "fused_ddp": "ddp", "layerwise_ddp": "ddp", "layerwise_fsdp2": "fsdp2"}
    plain = family.get(cell["strategy"], "auto")
    if cell.in_backward or cell["strategy"].startswith("fused"):
        return case.plain, plain
    if case.row.coupled:
        return None
    return case.layerwise, {"ddp": "layerwise_ddp"}.get(plain, plain)


def bound(cell: Cell) -> float:
    """Returns how far apart both forms may end, absolutely and relatively; docs/layerwise.md."""
    by_norm = cell["clipping"] in ("norm", "tiny norm", "huge norm")
    fused = cell["strategy"].startswith("fused")
    sums = cell["strategy"] == "layerwise_fsdp2" and cell["accumulation"] != "1"
    half = cell["precision"] in _HALF
    if not (by_norm or fused or sums):
        return 0.0
    return 2**-6 if half else 1e-5


def splits(cell: Cell) -> bool:
    """Whether a checkpoint of the middle is written."""
    return cell["flag"] not in ("fast_dev_run", "barebones")


def compares_control(cell: Cell) -> bool:
    """Whether the control does the same: the callbacks for which we do something else do not."""
    case = cell.case
    same = case.row.takes == "all" and not case.projects and not case.averages
    if not same or case.row.extra == "torchao" or cell["strategy"].startswith("fused") or refuses_clipping(cell):
        return False
    if cell["schedule"] == "plateau" and cell["flag"] == "val_check_interval":
        # Ours is asked after every validation, Lightning's at the end of an epoch.
        return False
    if cell["callback"] in ("GradientAccumulationScheduler", "BatchSizeFinder"):
        return cell["schedule"] in ("none", "plateau")
    return cell["callback"] not in ("BackboneFinetuning", "LearningRateFinder")


def refuses_clipping(cell: Cell) -> bool:
    """Whether Lightning refuses to clip for the upstream class, whose kernel unscales."""
    fused = bool({**cell.case.arguments, **cell.case.options}.get("fused"))
    return fused and cell["precision"].endswith("-mixed") and cell["clipping"] != "none"


def _weight_decay(cell: Cell) -> float:
    return 0.0 if cell["module"] == "sparse" else 0.1


def make(cell: Cell, identifier: str, compiled: bool) -> Named:
    """Returns the module with an optimizer by name."""
    schedule: dict[str, Any] = {
        "none": {},
        "linear": {"lr_scheduler": "linear"},
        "cosine, warm-up": {"lr_scheduler": "cosine", "warmup_steps": 2},
        "plateau": {"lr_scheduler": "reduce_lr_on_plateau", "lr_scheduler_args": _PLATEAU},
    }[cell["schedule"]]
    case = cell.case
    torch.manual_seed(0)
    decay = _weight_decay(cell)
    return Named(cell, compiled, optim=identifier, lr=case.lr, optim_args=case.options, weight_decay=decay, **schedule)


def make_control(cell: Cell, compiled: bool) -> Upstream:
    """Returns the module with the upstream class, for which AdamW stands where it needs groups of its own kind."""
    case = cell.case
    plainly = case.row.takes == "all" and not case.projects

    def configure(module: Upstream) -> Any:
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        decayed = [p for p in trained if p.ndim >= 2]
        others = [p for p in trained if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": _weight_decay(cell)}, {"params": others, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        optimizer: Any
        if plainly:
            arguments = {**case.arguments, **case.options}
            if refuses_clipping(cell):
                arguments["fused"] = False
            optimizer = case.load()(groups, lr=module.lr, **arguments)
        else:
            optimizer = torch.optim.AdamW(groups, lr=1e-3)
        if case.averages:
            optimizer.train()
        if cell["schedule"] == "none":
            return optimizer
        if cell["schedule"] == "plateau":
            options = {name: value for name, value in _PLATEAU.items() if name != "monitor"}
            scheduler: Any = ReduceLROnPlateau(optimizer, **options)  # type: ignore[arg-type]
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}
        total = module.trainer.estimated_stepping_batches
        warmup = 2 if cell["schedule"] == "cosine, warm-up" else 0
        scheduler = get_scheduler(cell["schedule"].partition(",")[0], optimizer, warmup, total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    torch.manual_seed(0)
    return Upstream(cell, compiled, configure)


def make_trainer(cell: Cell, strategy: str, folder: Path, watch: Watch) -> L.Trainer:
    """Returns the Trainer, which leaves checkpoints in ``folder`` if the cell is split."""
    callbacks: list[Callback] = [watch]
    if cell["callback"] in _CALLBACKS:
        callbacks.append(_CALLBACKS[cell["callback"]]())
    saves = splits(cell) or cell["callback"] == "ModelCheckpoint"
    if cell["callback"] == "ModelCheckpoint":
        callbacks.append(ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1))
    elif saves:
        callbacks.append(
            ModelCheckpoint(folder, filename="{epoch}", every_n_epochs=1, save_top_k=-1, save_on_train_epoch_end=True)
        )
    precision: dict[str, Any] = {"precision": cell["precision"]}
    if cell["precision"] == "16-mixed":
        # A scale that grows during training and overflows nowhere: what overflows is skipped otherwise in each form.
        scaler = GradScaler("cpu", init_scale=256.0, growth_interval=3)
        precision = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}
    strategies: dict[str, Any] = {"fsdp2": lambda: ModelParallelStrategy(2, 1)}
    accumulate = {} if cell["accumulation"] == "1" else {"accumulate_grad_batches": int(cell["accumulation"])}
    return L.Trainer(
        accelerator="cpu",
        devices=2 if cell.distributed else 1,
        strategy=strategies[strategy]() if strategy in strategies else strategy,
        callbacks=callbacks,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=saves,
        max_epochs=3 if cell["callback"] == "EarlyStopping" else 2,
        **precision,
        **accumulate,
        **_CLIPPING[cell["clipping"]],
        **_FLAGS[cell["flag"]],
    )


def middle(cell: Cell, folder: Path) -> Path:
    """Returns the checkpoint to go on from."""
    return folder / ("step=2.ckpt" if cell["callback"] == "ModelCheckpoint" else "epoch=0.ckpt")


# --- training --------------------------------------------------------------------------------------------------------


def fit(
    cell: Cell, way: str, folder: Path, resume: bool = False, compiled: bool | None = None, nudged: bool = False
) -> Outcome:
    """Trains in one way, from the middle if asked; returns how it ended, or the error.

    Only the whole training and what goes on from its middle are compiled, unless asked: the numbers are mostly the
    same. If ``nudged``, each weight begins one unit in the last place away.
    """
    compiled = way == WHOLE if compiled is None else compiled
    identifier = cell.case.layerwise if cell["form"] == "layerwise" else cell["identifier"]
    strategy = cell["strategy"]
    if way in (OTHER, CONTROL):
        form = other_form(cell)
        # The control has Lightning's strategies.
        plain = {"layerwise_ddp": "ddp"}.get(form[1], form[1]) if form else cell["strategy"]
        identifier, strategy = form if form and way == OTHER else (identifier, plain)
    folder = folder / way
    folder.mkdir(exist_ok=True)
    watch = Watch()
    module: Trains
    try:
        trainer = make_trainer(cell, strategy, folder, watch)
        module = make_control(cell, compiled) if way == CONTROL else make(cell, identifier, compiled)
        if nudged:
            _nudge(module, _HALF.get(cell["precision"], torch.float32))
        before = {name: _whole(parameter.detach()).clone() for name, parameter in module.named_parameters()}
        path = middle(cell, folder) if resume else None
        trainer.fit(module, ckpt_path=path, weights_only=True if resume and way != CONTROL else None)
        # FSDP2 leaves what forward has gathered in place until the next backward.
        return _ended(trainer, module, before, watch)
    except BaseException as error:  # torch's CheckpointException is no Exception
        ours = isinstance(error, OURS)
        where = traceback.extract_tb(error.__traceback__)[-1]
        return {
            "error": {
                "type": type(error).__name__,
                "text": str(error)[:1500],
                "ours": ours,
                "batches": watch.batches,
                "at": f"{'/'.join(Path(where.filename).parts[-3:])}:{where.lineno}",
                "trace": "" if ours else "".join(traceback.format_exception(error))[-3500:],
            }
        }


def _ended(trainer: L.Trainer, module: nn.Module, before: Mapping[str, Tensor], watch: Watch) -> Outcome:
    weights = {name: _whole(value) for name, value in module.state_dict().items()}
    parameters = {name: _whole(parameter.detach()) for name, parameter in module.named_parameters()}
    return {
        "weights": weights,
        "optimizer": _whole(trainer.optimizers[0].state_dict()),
        "rates": [float(group["lr"]) for group in trainer.optimizers[0].param_groups],
        "steps": trainer.global_step,
        "batches": watch.batches,
        "finite": all(bool(torch.isfinite(value).all()) for value in parameters.values()),
        "moved": sorted(name for name, value in parameters.items() if not _equal(before[name], value)),
        "agree": _ranks_agree(parameters),
    }


def _nudge(module: nn.Module, trained: torch.dtype) -> None:
    """Makes every weight greater by one unit in the last place of the dtype it is trained in."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1 + torch.finfo(trained).eps)


def _equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.to(other.dtype), other)


def _whole(value: Any) -> Any:
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, Tensor) and value.is_sparse:
        return value.to_dense()
    if isinstance(value, Mapping):
        return {key: _whole(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_whole(item) for item in value)
    return value


def _ranks_agree(parameters: Mapping[str, Tensor]) -> bool:
    if not dist.is_initialized():
        return True
    digest = hashlib.sha1()
    for value in parameters.values():
        digest.update(value.contiguous().view(torch.uint8).numpy().tobytes() if value.ndim else repr(value).encode())
    digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, digest.hexdigest())
    return len(set(digests)) == 1


# --- judging ---------------------------------------------------------------------------------------------------------


def apart(left: Outcome, right: Outcome, tolerance: float, parts: tuple[str, ...]) -> str:
    """Returns what differs first between two outcomes, or nothing."""
    if left["steps"] != right["steps"]:
        return f"{left['steps']} and {right['steps']} steps"
    for part in parts:
        found = _differs(left[part], right[part], tolerance, part)
        if found:
            return found
    return ""


def _differs(left: Any, right: Any, tolerance: float, where: str) -> str:
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        # torch adds it to the groups of an optimizer that was loaded, and to those that are added to it.
        left, right = ({key: item for key, item in side.items() if key != "differentiable"} for side in (left, right))
        if left.keys() != right.keys():
            return f"{where} has {sorted(map(str, left.keys() ^ right.keys()))[:4]} on one side only"
        found = (_differs(left[key], right[key], tolerance, f"{where}[{key!r}]") for key in left)
        return next(filter(None, found), "")
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        if len(left) != len(right):
            return f"{where} has {len(left)} and {len(right)} items"
        found = (_differs(a, b, tolerance, f"{where}[{n}]") for n, (a, b) in enumerate(zip(left, right, strict=True)))
        return next(filter(None, found), "")
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        if left.dtype is not right.dtype or left.shape != right.shape:
            return f"{where}: {left.dtype} {tuple(left.shape)} and {right.dtype} {tuple(right.shape)}"
        if torch.equal(left, right) or bool((left.isnan() & right.isnan() | (left == right)).all()):
            return ""
        wide = torch.complex128 if left.is_complex() else torch.float64
        far = float((left.to(wide) - right.to(wide)).abs().max())
        if tolerance and torch.allclose(left.to(wide), right.to(wide), rtol=tolerance, atol=tolerance):
            return ""
        return f"{where} is {far:.2e} apart"
    if isinstance(left, float) and isinstance(right, float) and tolerance:
        return "" if abs(left - right) <= tolerance * max(1.0, abs(left)) else f"{where}: {left} and {right}"
    return "" if type(left) is type(right) and left == right else f"{where}: {left!r} and {right!r}"


def first_process(cell: Cell, folder: Path) -> dict[str, Any]:
    """Trains without interruption, in the other form and as the control; returns what the record says of it."""
    _prepare(cell)
    whole = fit(cell, WHOLE, folder)
    control = fit(cell, CONTROL, folder)
    if "error" in whole and cell["compile"] != "no":
        control = fit(cell, CONTROL, folder, compiled=True)
    record: dict[str, Any] = {"control": _summary(control, cell)}
    if "error" in whole:
        return {**record, "error": whole["error"]}
    torch.save(whole, folder / f"whole{_rank()}.pt")
    if "error" not in control:
        torch.save(control, folder / f"control{_rank()}.pt")
    checks = {"sound": _sound(whole, cell), "other": "none", "control": "none"}
    other = None
    if other_form(cell):
        other, checks["other"] = _in_other_form(cell, whole, folder)
    if compares_control(cell) and "error" not in control:
        plain = other if cell.in_backward else whole
        if plain is not None and "error" not in plain:
            checks["control"] = apart(plain, control, 0.0, ("weights",)) or "same"
    elif "error" in control:
        checks["control"] = f"none: {_error(control)}"
    return {**record, "steps": whole["steps"], "checks": checks}


def _in_other_form(cell: Cell, whole: Outcome, folder: Path) -> tuple[Outcome, str]:
    """Trains in the other form; returns how it ended, and how it compares.

    Where sums have another order, training may amplify what rounding leaves: the square root of Adagrad does what is
    about zero. How much is asked of the same fit, begun one unit in the last place away.
    """
    other = fit(cell, OTHER, folder)
    found = _error(other) or apart(whole, other, bound(cell), ("weights",))
    is_compiled = bool(found) and cell["compile"] != "no"
    if is_compiled:
        other = fit(cell, OTHER, folder, compiled=True)
        found = _error(other) or apart(whole, other, bound(cell), ("weights",))
    if found and bound(cell) and "error" not in other:
        nudged = fit(cell, OTHER, folder, compiled=is_compiled, nudged=True)
        if "error" not in nudged:
            distance, amplified = _distance(whole, other), _distance(nudged, other)
            verdict = "same but for rounding" if distance <= 4 * amplified else found
            found = f"{verdict}: {distance:.2e} apart, a nudged one {amplified:.2e}"
    return other, found or "same"


def _distance(one: Outcome, other: Outcome) -> float:
    """Returns the greatest difference between two weights."""
    pairs = ((value, other["weights"][name]) for name, value in one["weights"].items())
    return max(float((a.to(torch.complex128) - b.to(torch.complex128)).abs().max()) for a, b in pairs if a.numel())


def second_process(cell: Cell, folder: Path) -> dict[str, Any]:
    """Goes on from the middle; returns what the record says of it."""
    _prepare(cell)
    split = fit(cell, WHOLE, folder, resume=True)
    parts = ("weights", "optimizer")
    if "error" in split:
        found: dict[str, Any] = {"split": _error(split), "split_error": split["error"]}
    else:
        whole = torch.load(folder / f"whole{_rank()}.pt", weights_only=False)
        found = {"split": apart(whole, split, 0.0, parts) or "same"}
    if found["split"] != "same" and middle(cell, folder / CONTROL).exists():
        control = fit(cell, CONTROL, folder, resume=True)
        found["control_split"] = _error(control)
        saved = folder / f"control{_rank()}.pt"
        if "error" not in control and saved.exists():
            found["control_split"] = apart(torch.load(saved, weights_only=False), control, 0.0, parts) or "same"
    return found


def _summary(outcome: Outcome, cell: Cell) -> dict[str, Any]:
    if "error" in outcome:
        return {"error": outcome["error"]}
    return {"steps": outcome["steps"], "sound": _sound(outcome, cell)}


def _error(outcome: Outcome) -> str:
    if "error" not in outcome:
        return ""
    return f"{outcome['error']['type']}: {' '.join(outcome['error']['text'].split())[:600]}"


def _sound(outcome: Outcome, cell: Cell) -> str:
    """Returns what is wrong with a training by itself, or ``"same"``."""
    if not outcome["steps"]:
        return "no step was taken"
    if not outcome["finite"]:
        return "a parameter is not finite"
    # The rate of a warm-up begins at 0, where SWA holds it; SWA averages what an epoch began with; RAdam waits for five
    # steps, Adopt and SOAP for one; what is clipped to next to nothing may be lost.
    if not outcome["moved"] and cell["callback"] == "SWA" and cell["flag"] == "fast_dev_run":
        return "same"
    tiny, few = "tiny" in cell["clipping"], outcome["steps"] < 5
    late = "warm-up" in cell["schedule"] or cell["identifier"] in ("schedule_free_radam", "adopt", "soap")
    if not outcome["moved"] and not (tiny or (late and (few or cell["callback"] == "SWA"))):
        return "no parameter moved"
    return "same" if outcome["agree"] else "the processes have different parameters"


def _rank() -> str:
    return os.environ.get("LOCAL_RANK", "0")


def _prepare(cell: Cell) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if cell["compile"] == "no":
        # torchao compiles its step, for a minute; the numbers are the same without.
        torch.compiler.set_stance("force_eager")


def run_part(part: str, cell: Cell, folder: Path) -> None:
    """Does one process's part, ``"first"`` or ``"second"``, and writes ``PART<rank>.json``."""
    found = first_process(cell, folder) if part == "first" else second_process(cell, folder)
    (folder / f"{part}{_rank()}.json").write_text(json.dumps(found), encoding="utf-8")
