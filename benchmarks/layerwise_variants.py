"""The models and the variants that ``layerwise.py`` compares."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim import OptimMixin
from lightning_optim.layerwise._engine import Layerwise

LR = 1e-3
HF_PACKAGES = {
    "transformers": "transformers==5.23.0",
    "accelerate": "accelerate==1.15.0",
    "psutil": "psutil==7.2.2",
    "galore_torch": "galore-torch==1.0",
}

Steps = Callable[[int], list[float]]  # takes so many steps and returns the seconds of each


class Block(nn.Module):
    """A norm and a layer around which the input is carried: three small parameters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, bias=False)
        self.layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Adds to the input."""
        return x + nn.functional.gelu(self.layer(self.norm(x)))


class Net(nn.Module):
    """Blocks and a small head, returning a loss; ``head`` is all that GaLore may project."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Returns the loss, as Hugging Face's Trainer and Lightning's take it."""
        return {"loss": self.head(self.body(x)).square().mean()}


class ViT(nn.Module):
    """An image model with the sizes of ViT-L/16, about 304 million parameters."""

    def __init__(self, width: int = 1024, layers: int = 24, heads: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, stride=16)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 197, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 1000)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Returns the mean squared logit: the work is what counts here."""
        patches = self.patches(images).flatten(2).mT
        tokens = torch.cat([self.token.expand(len(images), -1, -1), patches], dim=1) + self.positions
        return {"loss": self.head(self.encoder(tokens)[:, 0]).square().mean()}


@dataclass(frozen=True)
class Task:
    """A model to train on one batch over and over, and what to compare on it."""

    name: str
    build: Callable[[], nn.Module]
    batch: Tensor
    optimizer: type[Adam] = AdamW
    buckets_mb: tuple[float, ...] = ()  # besides the default and 0
    clock: Callable[[], float] = time.perf_counter
    trainers: bool = False  # whether Lightning's and Hugging Face's join in


Variant = Callable[[Task], Steps]  # builds the task's model; Trainers do so at every call of what they return


@dataclass
class Row:
    """One variant and what was measured."""

    name: str
    variant: Variant
    baseline: str
    bucket: int | None = None  # bytes
    seconds: list[float] = field(default_factory=list)  # the median of each round
    live: int = 0  # the most bytes of gradients at any moment
    largest: int = 0  # bytes of the largest gradient
    peak: int = 0  # bytes that a step allocates beyond what it found


def loop(attach: Callable[[Task, nn.Module], Callable[[], None]]) -> Variant:
    """Makes a variant of a function that attaches an optimizer to a model and returns what takes one step."""

    def start(task: Task) -> Steps:
        step = attach(task, task.build())

        def run(steps: int) -> list[float]:
            return [timed(step, task) for _ in range(steps)]

        return run

    return start


def timed(step: Callable[[], None], task: Task) -> float:
    """Returns the seconds that a step takes."""
    start = task.clock()
    step()
    if task.batch.is_cuda:
        torch.cuda.synchronize()
    return task.clock() - start


def plain(**options: Any) -> Variant:
    """Steps when backward is over."""

    def attach(task: Task, model: nn.Module) -> Callable[[], None]:
        optimizer = task.optimizer(model.parameters(), lr=LR, **options)

        def step() -> None:
            model(task.batch)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    return loop(attach)


def layerwise(bucket_mb: float | None, **options: Any) -> Variant:
    """Steps bucket by bucket during backward."""

    def attach(task: Task, model: nn.Module) -> Callable[[], None]:
        engine = Layerwise(task.optimizer(model.parameters(), lr=LR, **options), bucket_mb)
        return lambda: engine.backward(model(task.batch)["loss"])

    return loop(attach)


@loop
def per_parameter(task: Task, model: nn.Module) -> Callable[[], None]:
    """Steps one optimizer per parameter in its hook, as Hugging Face's Trainer does."""
    optimizers: dict[Tensor, Optimizer] = {p: task.optimizer([p], lr=LR) for p in model.parameters()}

    def hook(parameter: Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in optimizers:
        register: Any = parameter.register_post_accumulate_grad_hook
        register(hook)
    return lambda: model(task.batch)["loss"].backward()


def by_hand(limit: int) -> Variant:
    """Steps fixed buckets of at least ``limit`` bytes in hooks: the least that stepping during backward takes.

    It knows nothing of accumulation, clipping, checkpoints, parameters without gradients and all else that is not here.
    """

    def attach(task: Task, model: nn.Module) -> Callable[[], None]:
        def hook(parameter: Tensor) -> None:
            bucket = awaited[parameter]
            bucket.missing -= 1
            if not bucket.missing:
                bucket.missing = bucket.size
                bucket.optimizer.step()
                bucket.optimizer.zero_grad()

        awaited: dict[Tensor, Fixed] = {}
        for parameters in fixed_buckets(reversed(list(model.parameters())), limit):
            optimizer = task.optimizer(parameters, lr=LR, foreach=True)
            awaited.update(dict.fromkeys(parameters, Fixed(optimizer, len(parameters), len(parameters))))
        for parameter in awaited:
            register: Any = parameter.register_post_accumulate_grad_hook
            register(hook)
        return lambda: model(task.batch)["loss"].backward()

    return loop(attach)


@dataclass
class Fixed:
    """A bucket of :func:`by_hand`, and how many gradients are missing."""

    optimizer: Optimizer
    size: int
    missing: int


def fixed_buckets(parameters: Iterable[Tensor], limit: int) -> Iterator[list[Tensor]]:
    """Yields parameters in their order, in lists of at least ``limit`` bytes."""
    bucket: list[Tensor] = []
    for parameter in parameters:
        bucket.append(parameter)
        if sum(member.nbytes for member in bucket) >= limit:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


class LitNet(OptimMixin, LightningModule):
    """Lightning's view of a model; takes the seconds of its steps."""

    def __init__(self, task: Task, **optim: Any) -> None:
        super().__init__(**optim)
        self.model, self.clock = task.build(), task.clock
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.seconds.append(-self.clock())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.model(batch[0])["loss"]
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds[-1] += self.clock()


def lightning(optim: str) -> Variant:
    """Runs Lightning's Trainer with the optimizer of that name."""

    def run(task: Task, steps: int) -> list[float]:
        model = LitNet(task, optim=optim, lr=LR)
        off: Any = dict.fromkeys(
            ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
        )
        device: Any = {"accelerator": "gpu" if task.batch.is_cuda else "cpu", "devices": 1}
        data = TensorDataset(task.batch.cpu().repeat(steps, 1))
        Trainer(max_steps=steps, **device, **off).fit(model, DataLoader(data, len(task.batch)))
        return model.seconds

    return lambda task: lambda steps: run(task, steps)


def hugging_face(optim: str) -> Variant:
    """Runs Hugging Face's Trainer with the optimizer of that name; GaLore projects the small head alone."""

    def run(task: Task, steps: int) -> list[float]:
        import transformers

        seconds: list[float] = []

        class Watch(transformers.TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                seconds.append(-task.clock())

            def on_step_end(self, *_: Any, **__: Any) -> None:
                seconds[-1] += task.clock()

        galore: dict[str, Any] = {"optim_target_modules": ["head"], "optim_args": "rank=2,update_proj_gap=1000000"}
        with tempfile.TemporaryDirectory() as folder:
            settings = transformers.TrainingArguments(
                output_dir=folder,
                optim=optim,
                **(galore if "galore" in optim else {}),
                max_grad_norm=0,  # its layerwise optimizers do not clip, so plain must not either
                max_steps=steps,
                per_device_train_batch_size=len(task.batch),
                use_cpu=not task.batch.is_cuda,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            )
            data = [{"x": x} for x in task.batch.cpu().repeat(steps, 1)]
            trainer = transformers.Trainer(task.build(), settings, train_dataset=data, callbacks=[Watch()])
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train()
        return seconds

    return lambda task: lambda steps: run(task, steps)


def rows_of(task: Task) -> list[Row]:
    """Returns the variants to compare on a task, each with the plain one that it should be held against."""
    kernels = {"foreach": {"foreach": True}, "loop": {"foreach": False}, "fused": {"fused": True}}
    rows = [Row(f"plain {kernel}", plain(**options), f"plain {kernel}") for kernel, options in kernels.items()]

    def add(size: str, bucket_mb: float | None, kernel: str) -> None:
        limit = Layerwise(task.optimizer(task.build().parameters()), bucket_mb).bucket_bytes
        name, variant = f"layerwise {size} {kernel}", layerwise(bucket_mb, **kernels[kernel])
        rows.append(Row(name, variant, f"plain {kernel}", limit))

    for kernel in kernels:
        add("default", None, kernel)
    for bucket_mb in (*task.buckets_mb, 0.0):
        add(f"{bucket_mb:g} MiB", bucket_mb, "foreach")
    limit = Layerwise(task.optimizer(task.build().parameters())).bucket_bytes
    rows.append(Row("default buckets by hand", by_hand(limit), "plain foreach"))
    rows.append(Row("per parameter in hooks", per_parameter, "plain foreach"))
    if task.trainers:
        trainers = [("Lightning", lightning, "adamw_torch_layerwise")]
        if not missing():
            trainers.append(("Hugging Face", hugging_face, "galore_adamw_layerwise"))
        for name, trainer, optim in trainers:
            baseline = f"{name} adamw_torch"
            rows += [Row(baseline, trainer("adamw_torch"), baseline), Row(f"{name} {optim}", trainer(optim), baseline)]
    return rows


def missing() -> list[str]:
    """Returns what pip must install for the rows of Hugging Face's Trainer."""
    return [requirement for module, requirement in HF_PACKAGES.items() if find_spec(module) is None]
