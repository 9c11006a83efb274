"""Fits under DDP and layerwise_ddp, all in the same two processes; each writes what it noted to ``rank<n>.pt``.

``test_layerwise_ddp.py`` starts both and compares.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_optim import LayerwiseDDPStrategy, OptimizerMonitor
from tests.cases import BY_NAME, KINDS, LAYERWISE, case_of
from tests.models import LENGTH, TOKENS, WIDTH, ForeignTokens, LitTokens, fp16_mixed, loader, trainer

RANK = int(os.environ.get("LOCAL_RANK", 0))
BATCHES = 14  # seven per process: with accumulation over three, an epoch's last step has one micro-batch

ACCUMULATED_NORM = "accumulation, norm clipping"
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"accumulate_grad_batches": 3},
    "norm clipping": {"gradient_clip_val": 0.3},
    "value clipping": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    ACCUMULATED_NORM: {"accumulate_grad_batches": 3, "gradient_clip_val": 0.3},
    "accumulation, value clipping": {
        "accumulate_grad_batches": 3,
        "gradient_clip_val": 0.01,
        "gradient_clip_algorithm": "value",
    },
    "bf16": {"precision": "bf16-true", "gradient_clip_val": 0.3},
}
# What torchao compiles takes a minute in each process; its rows are stepped like any other.
NAMES = tuple(name for name in KINDS if name in LAYERWISE and not BY_NAME[name].upstream.startswith("torchao"))
COMPARED = [("adamw_torch", setting) for setting in SETTINGS]
COMPARED += [(name, ACCUMULATED_NORM) for name in NAMES if name != "adamw_torch"]
COMPARED += [("adamw_8bit", ACCUMULATED_NORM), ("adamw_8bit", "bf16"), ("schedule_free_adamw", "bf16")]

#: Scales losses of the second process beyond what float16 can hold: of all parameters, or of one, and clipped or not.
OVERFLOWS: dict[str, dict[str, Any]] = {
    "all": {},
    "all, accumulation": {"accumulate_grad_batches": 2},
    "all, norm clipping": {"gradient_clip_val": 0.3},
    "one, norm clipping": {"gradient_clip_val": 0.3},
    "one, accumulation": {"accumulate_grad_batches": 2},
    "one": {},
}
BUCKETS = (0.0, 0.01, None)
LAYOUTS = [(name, {"bucket_mb": size}) for name in ("adamw_torch_fused", "adamw_8bit") for size in (0.0, 1.0)]
HOWS = ("previous", "per_parameter")
CHAINED = ("adamw_torch", "adamw_8bit")


class Watch(Callback):
    """Notes after every batch whether the processes agree, what was sent, and the most gradient bytes alive."""

    def __init__(self) -> None:
        self.same: list[bool] = []
        self.reduced: list[int] = []
        self.norms: list[Tensor | None] = []
        self.scales: list[float] = []
        self.peak = 0
        self._hooks: list[Any] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        parameters = list(pl_module.parameters())

        def see(_: Tensor) -> None:
            # By storage: of a buffer that many gradients share, all of it is alive.
            storages = {p.grad.untyped_storage() for p in parameters if p.grad is not None}
            sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
            self.peak = max(self.peak, sum(sizes.values()))

        self._hooks = [p.register_post_accumulate_grad_hook(see) for p in parameters if p.requires_grad]

    def on_train_batch_start(self, *_: Any) -> None:
        Sent.count = 0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.reduced.append(Sent.count)
        mine = torch.cat([p.detach().flatten().double() for p in pl_module.parameters()])
        everyone = [torch.empty_like(mine), torch.empty_like(mine)]
        dist.all_gather(everyone, mine)
        self.same.append(torch.equal(everyone[0], everyone[1]))
        self.norms.append(trainer.callback_metrics.get("grad_norm"))
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            self.scales.append(scaler.get_scale())

    def on_exception(self, *_: Any) -> None:
        for hook in self._hooks:
            hook.remove()


class Sent:
    """Counts the calls of a collective."""

    count = 0

    @classmethod
    def counting(cls, collective: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            cls.count += 1
            return collective(*args, **kwargs)

        return counted


class Truth(Callback):
    """Notes after every batch what a monitor logged, and what it should be, from whole tensors."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.true: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.before = [whole(parameter).clone() for parameter in pl_module.parameters()]
        self.true.append({})

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        gradients = [whole(p.grad) for p in pl_module.parameters() if p.grad is not None]
        if gradients:
            self.true[-1]["optim/grad_norm"] = norm(gradients)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        after = [whole(parameter) for parameter in pl_module.parameters()]
        moved = norm([one - other for one, other in zip(after, self.before, strict=True)])
        states = trainer.optimizers[0].state.values()
        self.true[-1]["optim/update_ratio"] = moved / norm(self.before)
        self.true[-1]["optim/momentum_norm"] = norm([whole(state["exp_avg"]) for state in states])
        found = {key: value.item() for key, value in trainer.callback_metrics.items() if key.startswith("optim/")}
        self.logged.append(found)


def whole(tensor: Any) -> Tensor:
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach()


def norm(tensors: list[Tensor]) -> float:
    return torch.cat([tensor.double().flatten() for tensor in tensors]).norm().item()


def monitored(run: Callable[..., Any], *args: Any, **flags: Any) -> dict[str, Any]:
    """Fits with a monitor that logs every step; returns what it logged, and the truth."""
    truth = Truth()
    run(*args, callbacks=(OptimizerMonitor(every_n_steps=1), truth), **flags)
    return {"logged": truth.logged, "true": truth.true}


def fit(
    name: str = "adamw_torch",
    strategy: Any = "ddp",
    module: Callable[..., L.LightningModule] = LitTokens,
    options: dict[str, Any] | None = None,
    seed: int = 0,
    module_args: dict[str, Any] | None = None,
    val: bool = False,
    callbacks: tuple[Callback, ...] = (),
    **flags: Any,
) -> dict[str, Any]:
    """Trains ten steps; returns the weights and what was noted, or the error."""
    case = case_of(name)
    torch.manual_seed(seed)
    model = module(
        optim=name,
        lr=case.lr,
        weight_decay=0.1,
        lr_scheduler=case.schedule,
        optim_args={**case.options, **(options or {})},
        **(module_args or {}),
    )
    watch = Watch()
    run = trainer(strategy=strategy, devices=2, **{"max_steps": 10, **flags}, callbacks=[watch, *callbacks])
    try:
        run.fit(model, loader(BATCHES), loader(4, seed=1) if val else None)
    except (ValueError, RuntimeError) as error:
        hooked = [key for key, p in model.named_parameters() if getattr(p, "_post_accumulate_grad_hooks", None)]
        return {"error": type(error).__name__, "text": str(error), "hooked": hooked, "batches": len(watch.same)}
    noted = {key: getattr(watch, key) for key in ("same", "reduced", "norms", "scales", "peak")}
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    return {"weights": weights, "steps": run.global_step, **noted, **getattr(model, "noted", {})}


def layerwise(name: str = "adamw_torch", **kwargs: Any) -> dict[str, Any]:
    """Fits layer by layer."""
    return fit(f"{name}_layerwise", "layerwise_ddp", **kwargs)


def both(name: str = "adamw_torch", options: dict[str, Any] | None = None, **kwargs: Any) -> dict[str, dict[str, Any]]:
    """Fits under DDP and layer by layer, the latter with ``options``."""
    return {"ddp": fit(case_of(name).plain, **kwargs), "layerwise": layerwise(name, options=options, **kwargs)}


class Normed(LitTokens):
    """Has BatchNorm; notes the buffers that every forward finds."""

    def __init__(self, **optim: Any) -> None:
        super().__init__(**optim)
        self.batch_norm = nn.BatchNorm1d(LENGTH)
        # As a transposed table would be.
        self.register_buffer("table", torch.randn(LENGTH, TOKENS).t())
        self.noted: dict[str, list[Any]] = {"trained": [], "validated": []}

    def _note(self, key: str) -> None:
        self.noted[key].append([buffer.clone() for buffer in self.buffers()])

    def forward(self, tokens: Tensor) -> Tensor:
        return self.batch_norm(super().forward(tokens)) + self.table.t()

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        self._note("trained")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        self._note("validated")
        super().validation_step(batch, batch_idx)


class Deep(LitTokens):
    """Twelve blocks of equal size."""

    def __init__(self, **optim: Any) -> None:
        super().__init__(**optim)
        blocks = (nn.Linear(TOKENS * 2, TOKENS * 2) for _ in range(12))
        self.model = nn.Sequential(nn.Embedding(TOKENS, TOKENS * 2), *blocks, nn.Linear(TOKENS * 2, TOKENS))


class Branches(LitTokens):
    """Gradients arrive in an order that depends on the process and the batch; one parameter has another dtype."""

    def __init__(self, **optim: Any) -> None:
        super().__init__(**optim)
        self.one, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH, dtype=torch.float64))
        self.turn = 0

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.model.embedding(tokens) * self.scale.float()
        branches = [self.one, self.other, self.model.linear]
        if (self.trainer.global_rank + self.turn // 3) % 2:
            branches.reverse()
        self.turn += 1
        outputs = {branch: torch.tanh(branch(hidden)) for branch in branches}
        # Summed in the same order everywhere: the numbers do not depend on the process.
        return self.model.head(self.model.norm(sum(outputs[branch] for branch in (self.one, self.other))))

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + 0 * self.model.linear(torch.ones(WIDTH)).sum()


class ChannelsLast(LitTokens):
    """Has a convolution whose weight, and so its gradient, is not laid out row by row; and tied weights."""

    def __init__(self, **optim: Any) -> None:
        super().__init__(**optim)
        self.conv = nn.Conv2d(8, 64, 3, padding=1).to(memory_format=torch.channels_last)
        self.model.head.weight = self.model.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.model.embedding(tokens).view(-1, 8, 8, 8).contiguous(memory_format=torch.channels_last)
        hidden = F.gelu(self.conv(hidden)).permute(0, 2, 3, 1).flatten(1, 2)[:, :LENGTH]
        return self.model.head(self.model.norm(self.model.linear(hidden)))


class Overflowing(LitTokens):
    """Gradients of the second process overflow in the third batch: all of them, or that of the head's bias."""

    def __init__(self, where: str, **optim: Any) -> None:
        super().__init__(**optim)
        self.where = where
        self.overflows = False
        self.model.head.bias.register_hook(lambda gradient: gradient * self._factor(self.where == "one"))

    def _factor(self, applies: bool) -> float:
        return float("inf") if applies and self.overflows and self.trainer.global_rank == 1 else 1.0

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        self.overflows = batch_idx == 2
        return super().training_step(batch, batch_idx) * self._factor(self.where == "all")


class Unused(LitTokens):
    """``extra`` takes part where ``uses(rank, batch_idx)``; its gradient is not zero."""

    def __init__(self, uses: Callable[[int, int], bool], **optim: Any) -> None:
        super().__init__(**optim)
        self.extra = nn.Parameter(torch.ones(TOKENS))
        self.uses = uses
        self.save_hyperparameters(ignore="uses")

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + (self.extra**2).sum() if self.uses(self.trainer.global_rank, batch_idx) else loss


class OwnNorms(LitTokens):
    """Under DDP: clips what it averaged as ``how`` says, by hand, and notes the total norm before."""

    def __init__(self, how: str = "", **optim: Any) -> None:
        super().__init__(**optim)
        self.how = how
        self.noted: dict[str, list[Any]] = {"own_norms": []}

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        if self.how == "per_parameter":
            for parameter in parameters:
                torch.nn.utils.clip_grad_norm_([parameter], 0.1)
        elif self.how == "previous":
            torch.nn.utils.clip_grads_with_norm_(parameters, 0.1, [*self.noted["own_norms"], norm][-2:][0])
        self.noted["own_norms"].append(norm)


class OwnOptimizer(ForeignTokens):
    """An ordinary LightningModule that learns."""

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, fused=True)


class Manual(OwnOptimizer):
    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.automatic_optimization = False


class Sparse(OwnOptimizer):
    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.model.embedding = nn.Embedding(TOKENS, WIDTH, sparse=True)


class Unfreeze(Callback):
    """Trains the large matrix from the fifth batch on."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.model.linear.weight.requires_grad_(False)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        pl_module.model.linear.weight.requires_grad_(trainer.global_step >= 5)


def leg(name: str, directory: Path, checkpoint: Path | None = None, **flags: Any) -> dict[str, Any]:
    """Trains to the twentieth step, from a checkpoint if there is one; returns the checkpoint of the end."""
    case = case_of(name)
    torch.manual_seed(0 if checkpoint is None else 1)
    model = LitTokens(optim=name, lr=case.lr, weight_decay=0.1, lr_scheduler=case.schedule)
    saver = ModelCheckpoint(directory, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    flags = {"max_steps": 20, "gradient_clip_val": 0.3, "enable_checkpointing": True, **flags}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes that Lightning starts: two threads round a sum differently
    try:
        trainer(callbacks=[saver], **flags).fit(model, loader(5), ckpt_path=checkpoint)
    finally:
        torch.set_num_threads(threads)
    return torch.load(directory / "step=20.ckpt", weights_only=True)


def chain(name: str, directory: Path) -> None:
    """The leg of the chain that two processes train; both see every batch."""
    flags = {"strategy": "layerwise_ddp", "devices": 2, "use_distributed_sampler": False}
    leg(name + "_layerwise", directory / "layerwise_ddp", directory / "layerwise" / "step=10.ckpt", **flags)


def runs(directory: Path, names: Container[str]) -> Iterator[tuple[str, Any]]:
    """Yields every run by name; if there are ``names``, only those that compare these with DDP."""
    for name, setting in COMPARED:
        if not names or name in names:
            yield f"{name}, {setting}", both(name, **SETTINGS[setting])
    if names:
        return
    for where, flags in OVERFLOWS.items():
        args = {"where": where.split(",")[0]}
        yield (
            f"overflow, {where}",
            {
                "ddp": fit(module=Overflowing, module_args=args, plugins=[fp16_mixed()], **flags),
                "layerwise": layerwise(module=Overflowing, module_args=args, plugins=[fp16_mixed()], **flags),
            },
        )
    yield "buffers", both(module=Normed, val=True, val_check_interval=3, max_steps=9)
    yield "seeded by rank", both(seed=RANK)
    for bucket_mb in BUCKETS:
        yield f"bucket_mb={bucket_mb}", both(module=Deep, options={"bucket_mb": bucket_mb}, gradient_clip_val=0.3)
    for name, options in LAYOUTS:
        yield f"layouts, {name}, {options}", both(name, options, module=ChannelsLast)
    yield "branches", both(module=Branches, options={"bucket_mb": 0.01}, accumulate_grad_batches=2)
    for how in HOWS:
        by_hand = fit(module=OwnNorms, module_args={"how": how})
        yield how, {"ddp": by_hand, "layerwise": layerwise(options={"norm_clipping": how}, gradient_clip_val=0.1)}
    for batches in (1, 3):
        flags = {"accumulate_grad_batches": batches}
        yield (
            f"log_grad_norm, {batches}",
            {"ddp": fit(module=OwnNorms, **flags), "layerwise": layerwise(options={"log_grad_norm": True}, **flags)},
        )
    strategy = LayerwiseDDPStrategy(bucket_mb=0.001)
    yield "own optimizer", {"ddp": fit(module=OwnOptimizer), "layerwise": fit(module=OwnOptimizer, strategy=strategy)}
    several = {"param_groups": {"model[.](embedding|head)[.].*": {"optim": "adamw_8bit", "lr": 0.01}}}
    yield "several optimizers", both("sgd", module_args=several, **SETTINGS[ACCUMULATED_NORM])
    clipped = SETTINGS["norm clipping"]
    yield "monitor", {"ddp": monitored(fit, **clipped), "layerwise": monitored(layerwise, **clipped)}
    yield "unfrozen later", {"layerwise": layerwise(callbacks=(Unfreeze(),), gradient_clip_val=0.3)}

    late = {"module": Unused, "accumulate_grad_batches": 2}
    last = {"uses": lambda rank, batch: batch in (1, 3, 5, 6)}
    yield "only in last micro-batches", both(module_args=last, **late)
    first = {"uses": lambda rank, batch: batch in (0, 2, 4, 6)}
    yield "only in first micro-batches", {"layerwise": layerwise(module_args=first, **late)}

    # Refused by both processes before anything of the step is sent, so that they can go on.
    yield "unused", layerwise(module=Unused, module_args={"uses": lambda rank, batch: False})
    yield "unused in one process", layerwise(module=Unused, module_args={"uses": lambda rank, batch: rank == 0})
    yield "manual", fit(strategy="layerwise_ddp", module=Manual)
    yield "sparse", fit(strategy="layerwise_ddp", module=Sparse)
    yield "plain strategy", fit("adamw_8bit_layerwise", "ddp")
    yield "after refusals", both()
    for name in CHAINED:
        chain(name, directory / name)


def main(task: str, argument: str, *names: str) -> None:
    if task == "runs":
        dist.all_reduce = Sent.counting(dist.all_reduce)
        torch.save(dict(runs(Path(argument), names)), Path(argument) / f"rank{RANK}.pt")
    elif task == "notebook":
        torch.save(fit("adamw_8bit_layerwise", "layerwise_ddp_notebook", **SETTINGS[ACCUMULATED_NORM]), argument)
    else:
        assert task == "unused later"
        uses = {"uses": lambda rank, batch: rank != int(argument) or batch < 3}
        sys.exit(layerwise(module=Unused, module_args=uses)["text"])


if __name__ == "__main__":
    main(*sys.argv[1:])
