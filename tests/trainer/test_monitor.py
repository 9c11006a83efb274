"""``OptimizerMonitor``: its values are those of a loop written by hand, and between its logs nothing waits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import pytorch_lightning as pl
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_optim import IncompatibleTrainer, InvalidOption, Layerwise, OptimizerMonitor, build_optimizer
from lightning_optim.build import measured_bytes
from tests.models import LitTokens, TokenModel, fp16_mixed, loader, trainer

NAMES = ("adamw_torch", "adamw_torch_layerwise")
LR, STEPS = 1e-2, 6


class Noted(Logger):
    """Keeps what it is given."""

    name = version = None

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        found = {name: value for name, value in metrics.items() if name.startswith("optim")}
        self.rows += [(step, found)] if found else []

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def of(self, name: str) -> list[float]:
        """Returns the values of one name."""
        return [row[name] for _, row in self.rows]


class Overflowing(LitTokens):
    """Its loss is infinite in float16 in the batches named."""

    def __init__(self, batches: tuple[int, ...] = (), **optim: Any) -> None:
        super().__init__(**optim)
        self.batches = batches

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * (1e30 if batch_idx in self.batches else 1.0)


def fit(
    module: L.LightningModule, monitor: OptimizerMonitor | None = None, batches: int = 10, **flags: Any
) -> tuple[Noted, L.Trainer]:
    noted = Noted()
    monitor = monitor or OptimizerMonitor(every_n_steps=1)
    run = trainer(**{"max_steps": STEPS, "logger": noted, "callbacks": [monitor], **flags})
    run.fit(module, loader(batches), ckpt_path=flags.pop("ckpt_path", None))
    return noted, run


def tokens(name: str = "adamw_torch", **optim: Any) -> LitTokens:
    torch.manual_seed(0)
    options = {"optim_args": {"bucket_mb": 0.0}} if name.endswith("_layerwise") else {}
    return LitTokens(optim=name, lr=LR, **{**options, **optim})


# --- the values of a loop written by hand ----------------------------------------------------------------------------


def norm(tensors: list[Tensor]) -> float:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors]).norm().item()


def by_hand(accumulate: int = 1, clip: float | None = None, algorithm: str = "norm", bf16: bool = False) -> Any:
    """Yields, for each step: by unit the norms of gradients, updates over weights, and first moments."""
    torch.manual_seed(0)
    model = TokenModel()
    if bf16:
        model.bfloat16()
    optimizer = build_optimizer(model, "adamw_torch", lr=LR)
    groups = {group["name"]: group["params"] for group in optimizer.param_groups}
    layers = {name: list(module.parameters()) for name, module in model.named_children()}
    units = {"": list(model.parameters()), **groups, **{f"model.{name}": layer for name, layer in layers.items()}}
    for number, (inputs, targets) in enumerate(loader(STEPS * accumulate), 1):
        scores = model(inputs)
        (nn.functional.cross_entropy(scores.flatten(0, 1).float(), targets.flatten()) / accumulate).backward()
        if number % accumulate:
            continue
        gradients = {name: norm([p.grad for p in unit if p.grad is not None]) for name, unit in units.items()}
        if clip is not None:
            clipper = {"norm": nn.utils.clip_grad_norm_, "value": nn.utils.clip_grad_value_}[algorithm]
            clipper(model.parameters(), clip)
        before = {p: p.detach().clone() for p in model.parameters()}
        optimizer.step()
        ratios = {
            name: norm([p - before[p] for p in unit]) / norm([before[p] for p in unit]) for name, unit in units.items()
        }
        momenta = {name: norm([optimizer.state[p]["exp_avg"] for p in unit]) for name, unit in units.items()}
        optimizer.zero_grad()
        yield {"grad_norm": gradients, "update_ratio": ratios, "momentum_norm": momenta}


SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "norm clipping": ({"gradient_clip_val": 0.3}, {"clip": 0.3}),
    "value clipping": (
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"clip": 0.01, "algorithm": "value"},
    ),
    "accumulation": ({"accumulate_grad_batches": 3}, {"accumulate": 3}),
    "accumulation, clipping": (
        {"accumulate_grad_batches": 3, "gradient_clip_val": 0.3},
        {"accumulate": 3, "clip": 0.3},
    ),
    "bf16": ({"precision": "bf16-true"}, {"bf16": True}),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", NAMES)
def test_values_are_those_of_a_loop_by_hand(name: str, setting: str) -> None:
    flags, own = SETTINGS[setting]
    noted, run = fit(tokens(name), batches=STEPS * own.get("accumulate", 1), **flags)
    assert [step for step, _ in noted.rows] == list(range(STEPS))
    for (_, row), expected in zip(noted.rows, by_hand(**own), strict=True):
        for metric, of_units in expected.items():
            for unit in ("", "decay", "no_decay"):
                value = row["/".join(filter(None, ("optim", metric, unit)))]
                assert value == pytest.approx(of_units[unit], rel=2e-2 if own.get("bf16") else 2e-5), (metric, unit)
    state = measured_bytes(run.optimizers[0].state_dict())
    assert noted.of("optim/state_bytes") == [state] * STEPS
    assert noted.of("optim/state_bytes/decay")[0] + noted.of("optim/state_bytes/no_decay")[0] == state
    assert set(noted.of("optim/skipped_steps") + noted.of("optim/nonfinite_steps")) == {0}


@pytest.mark.parametrize("name", NAMES)
def test_per_layer(name: str) -> None:
    noted, _ = fit(tokens(name), OptimizerMonitor(every_n_steps=1, per="layer"))
    for (_, row), expected in zip(noted.rows, by_hand(), strict=True):
        for metric, of_units in expected.items():
            for unit in ("embedding", "linear", "norm", "head"):
                assert row[f"optim/{metric}/model.{unit}"] == pytest.approx(of_units[f"model.{unit}"], rel=2e-5)
        assert row["optim/lr/decay"] == LR, "rates belong to groups"


@pytest.mark.parametrize("name", NAMES)
def test_logs_at_the_steps_of_self_log_and_the_largest_norm_between_them(name: str) -> None:
    noted, run = fit(tokens(name), OptimizerMonitor(), log_every_n_steps=3)
    norms = [step["grad_norm"][""] for step in by_hand()]
    assert [step for step, _ in noted.rows] == [2, 5]
    assert noted.of("optim/grad_norm") == pytest.approx([norms[2], norms[5]], rel=2e-5)
    assert noted.of("optim/grad_norm_max") == pytest.approx([max(norms[:3]), max(norms[3:])], rel=2e-5)
    assert run.callback_metrics["optim/grad_norm"] == pytest.approx(norms[5], rel=2e-5)


LEAN = ["lr", "grad_norm", "update_ratio", "skipped_steps"]  # what looks at the steps that are logged only


@pytest.mark.parametrize("name", NAMES)
def test_only_what_asks_for_every_step_looks_at_the_gradients_of_every_step(name: str) -> None:
    def norms_taken(**options: Any) -> tuple[Noted, int]:
        with torch.profiler.profile() as profile:
            noted, _ = fit(tokens(name), OptimizerMonitor(**options), log_every_n_steps=3)
        return noted, sum(event.count for event in profile.key_averages() if event.key == "aten::_foreach_norm")

    noted, taken = norms_taken(metrics=["grad_norm", "grad_norm_max"])
    lean, rarely = norms_taken(metrics=["grad_norm"])
    assert lean.of("optim/grad_norm") == noted.of("optim/grad_norm")
    assert "optim/grad_norm_max" not in lean.rows[0][1]
    assert 0 < 3 * rarely == taken


def test_a_part_of_large_weights_stands_for_all() -> None:
    torch.manual_seed(0)

    class Wide(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(512, 512)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.net(torch.randn(64, 512)).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1.0)

    def ratios(copy_mb: float) -> list[float]:
        torch.manual_seed(1)
        noted, _ = fit(Wide(), OptimizerMonitor(every_n_steps=1, copy_mb=copy_mb))
        return noted.of("optim/update_ratio")

    exact, estimated = ratios(256), ratios(0.1)
    assert estimated == pytest.approx(exact, rel=2e-2)
    assert estimated != exact


# --- loss scaling ----------------------------------------------------------------------------------------------------

SCALED: dict[str, dict[str, Any]] = {
    "adamw_torch": {},
    "adamw_torch_fused": {},  # Lightning leaves its gradients scaled
    "adamw_torch_layerwise": {"overflow": "skip_step", "bucket_mb": 0.0},
}


@pytest.mark.parametrize("name", SCALED)
def test_under_a_scaler_norms_are_unscaled_and_skipped_steps_counted(name: str) -> None:
    torch.manual_seed(0)
    module = Overflowing((2,), optim=name, lr=LR, optim_args=SCALED[name])
    noted, _ = fit(module, plugins=fp16_mixed())
    expected = [step["grad_norm"][""] for step in by_hand()]
    assert noted.of("optim/grad_norm")[:2] == pytest.approx(expected[:2], rel=1e-2)
    assert not math.isfinite(noted.of("optim/grad_norm")[2])
    # The same weights as two steps before, with another batch.
    assert noted.of("optim/grad_norm")[3] == pytest.approx(expected[2], rel=0.5)
    for metric in ("skipped_steps", "nonfinite_steps"):
        assert noted.of(f"optim/{metric}") == [0, 0, 1, 1, 1, 1], metric
    # Nothing moved; the kernel of a fused step is run, and moves nothing.
    assert noted.rows[2][1].get("optim/update_ratio", 0.0) == 0.0
    assert noted.of("optim/skipped_steps/decay")[-1] == 1


@pytest.mark.parametrize("name", SCALED)
def test_skipped_steps_between_the_logs_are_counted_without_norms(name: str) -> None:
    torch.manual_seed(0)
    module = Overflowing((1,), optim=name, lr=LR, optim_args=SCALED[name])
    noted, _ = fit(module, OptimizerMonitor(every_n_steps=3, metrics=LEAN), plugins=fp16_mixed())
    assert noted.of("optim/skipped_steps") == [1, 1]
    assert "optim/nonfinite_steps" not in noted.rows[0][1]


def test_a_bucket_that_overflows_is_the_only_one_that_is_skipped() -> None:
    torch.manual_seed(0)
    module = LitTokens(optim="adamw_torch_layerwise", lr=LR, optim_args={"overflow": "skip_bucket", "bucket_mb": 0.0})

    def overflow(gradient: Tensor) -> Tensor:
        return torch.full_like(gradient, torch.inf) if len(module.losses) == 3 else gradient

    module.model.embedding.weight.register_hook(overflow)
    noted, _ = fit(module, OptimizerMonitor(every_n_steps=1, per="layer"), plugins=fp16_mixed())
    for metric in ("skipped_steps", "nonfinite_steps"):
        assert noted.of(f"optim/{metric}/model.embedding") == [0, 0, 1, 1, 1, 1]
        assert noted.of(f"optim/{metric}/model.head") == [0] * STEPS
        assert noted.of(f"optim/{metric}")[-1] == 1
    assert "optim/update_ratio/model.embedding" not in noted.rows[2][1]
    assert noted.rows[2][1]["optim/update_ratio/model.head"] > 0


# --- what optimizers know of themselves ------------------------------------------------------------------------------


def test_true_rates() -> None:
    schedule = {"lr_scheduler": "linear", "warmup_steps": 2}
    noted, _ = fit(tokens(**schedule))
    assert noted.of("optim/lr") == pytest.approx([LR * factor for factor in (0, 0.5, 1, 0.75, 0.5, 0.25)])
    torch.manual_seed(0)
    noted, _ = fit(LitTokens(optim="adafactor", optim_args={"relative_step": True, "warmup_init": True}))
    assert noted.of("optim/lr") == pytest.approx([1e-6 * step for step in range(1, STEPS + 1)])
    noted, _ = fit(tokens("schedule_free_adamw", warmup_steps=4))
    assert noted.of("optim/lr") == pytest.approx([LR * min(1, step / 4) for step in range(1, STEPS + 1)])
    noted, _ = fit(tokens("schedule_free_adamw_layerwise", warmup_steps=4))
    assert noted.of("optim/lr") == pytest.approx([LR * min(1, step / 4) for step in range(1, STEPS + 1)])
    assert "optim/momentum_norm" not in noted.rows[0][1], "it keeps none"


def test_groups_with_other_rates_have_no_common_one() -> None:
    noted, run = fit(tokens(param_groups={".*head.*": {"lr": 1e-3}}), OptimizerMonitor(1, prog_bar=["lr"]))
    rates = {f"optim/lr/{group['name']}": group["lr"] for group in run.optimizers[0].param_groups}
    assert {name: value for name, value in noted.rows[-1][1].items() if name.startswith("optim/lr")} == rates
    assert set(rates.values()) == {LR, 1e-3}
    assert rates.keys() == {name for name in run.progress_bar_metrics if name.startswith("optim")}


def test_a_momentum_that_is_quantized_is_left_out_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        noted, _ = fit(tokens("adamw_8bit"))
    row = noted.rows[-1][1]
    assert "optim/momentum_norm/no_decay" in row, "vectors are not quantized"
    assert "optim/momentum_norm" not in row
    assert "optim/momentum_norm/decay" not in row
    assert caplog.text.count("optim/momentum_norm") == 1


@pytest.mark.parametrize("suffix", ["", "_layerwise"])
def test_projections(suffix: str) -> None:
    options = {"rank": 4, "update_proj_gap": 2, "projection": "svd", "scale": 1.0}
    energies: list[float] = []

    class Energy(L.Callback):
        """What the best subspace holds of the gradients at the steps in which it is looked for."""

        def on_before_zero_grad(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
            gradients = [module.weight.grad for module in (pl_module.model.linear, pl_module.model.head)]
            if gradients[0] is not None:
                squares = [torch.linalg.svdvals(gradient).square() for gradient in gradients]
                energies.append(float(sum(s[:4].sum() for s in squares) / sum(s.sum() for s in squares)))

    module = tokens("galore_adamw" + suffix, optim_target_modules="all-linear", optim_args=options)
    noted, _ = fit(module, callbacks=[OptimizerMonitor(every_n_steps=1), Energy()])
    assert noted.of("optim/projection/refreshes") == [2, 2, 4, 4, 6, 6]
    assert noted.of("optim/projection/skipped") == [0] * STEPS
    found = noted.of("optim/projection/energy")
    assert all(0 < energy <= 1.0001 for energy in found)
    if not suffix:
        # Lightning zeroes gradients before the next backward.
        assert found[:5:2] == pytest.approx(energies[:5:2], rel=1e-3)
    module = tokens("apollo_adamw" + suffix, optim_target_modules="all-linear", optim_args={"update_proj_gap": 2})
    noted, _ = fit(module)
    assert noted.of("optim/projection/refreshes") == [2, 2, 4, 4, 6, 6]
    assert "optim/projection/energy" not in noted.rows[0][1], "a random projection captures nothing"


# --- loops -----------------------------------------------------------------------------------------------------------


class Two(L.LightningModule):
    """Two optimizers by hand, the second stepped twice in a batch; one of them perhaps during backward."""

    def __init__(self, layerwise: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.nets = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.layerwise = layerwise
        self.norms: list[list[float]] = [[], []]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for index in (0, 1, 1):
            optimizer: Any = self.optimizers()[index]
            optimizer.zero_grad()
            loss = self.nets[index](torch.ones(2, 4)).square().sum()
            parameters = list(self.nets[index].parameters())
            self.norms[index].append(norm(list(torch.autograd.grad(loss, parameters, retain_graph=True))))
            layerwise = Layerwise.of(optimizer)
            if layerwise is None:
                self.manual_backward(loss)
            else:
                with layerwise.stepping():
                    self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        optimizers = [torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9) for net in self.nets]
        if self.layerwise:
            Layerwise(optimizers[1])
        return optimizers


@pytest.mark.parametrize("layerwise", [False, True])
def test_several_optimizers_in_manual_optimization(layerwise: bool) -> None:
    torch.manual_seed(0)
    module = Two(layerwise)
    noted, _ = fit(module, max_steps=-1, max_epochs=1, limit_train_batches=4)
    assert [step for step, _ in noted.rows] == [0, 1, 2, 3]
    assert noted.of("optim_0/grad_norm") == pytest.approx(module.norms[0])
    assert noted.of("optim_1/grad_norm") == pytest.approx(module.norms[1][1::2]), "the last step of each batch"
    pairs = zip(module.norms[1][::2], module.norms[1][1::2], strict=True)
    assert noted.of("optim_1/grad_norm_max") == pytest.approx(list(map(max, pairs)))
    assert "optim_0/lr" in noted.rows[0][1]


@pytest.mark.parametrize("name", NAMES)
def test_resume_counts_on_and_a_second_fit_anew(name: str, tmp_path: Path) -> None:
    def module() -> Overflowing:
        torch.manual_seed(0)
        skips = {"overflow": "skip_step"} if name.endswith("layerwise") else {}
        return Overflowing((1,), optim=name, lr=LR, optim_args=skips)

    flags: dict[str, Any] = {"plugins": fp16_mixed(), "log_every_n_steps": 4}
    _, whole = fit(module(), OptimizerMonitor(), max_steps=8, batches=4, **flags)
    noted, run = fit(module(), OptimizerMonitor(), max_steps=3, batches=4, **flags)
    assert not noted.rows
    run.save_checkpoint(tmp_path / "three.ckpt", weights_only=False)
    resumed = Noted()
    monitor = OptimizerMonitor()
    again = trainer(max_epochs=3, logger=resumed, callbacks=[monitor], **{**flags, "plugins": fp16_mixed()})
    again.fit(module(), loader(4), ckpt_path=tmp_path / "three.ckpt")
    for metric in ("skipped_steps", "nonfinite_steps"):
        assert whole.callback_metrics[f"optim/{metric}"] == 2
        assert resumed.of(f"optim/{metric}") == [1, 2]
    again.fit_loop.max_epochs = 4
    again.fit(module(), loader(4))
    assert resumed.of("optim/skipped_steps")[-1] == 0, "it logs in its first step"


class Interrupts(L.Callback):
    def on_train_batch_end(self, *_: Any) -> None:
        raise RuntimeError("interrupted")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_stays_hooked(name: str, fails: bool) -> None:
    monitor = OptimizerMonitor(every_n_steps=1)
    run = trainer(max_steps=2, logger=Noted(), callbacks=[monitor, *([Interrupts()] if fails else [])])
    module = tokens(name)
    hooks: list[int] = []

    class Before(L.Callback):
        def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            hooks.append(len(trainer.optimizers[0]._optimizer_step_pre_hooks))

    run.callbacks.append(Before())  # type: ignore[attr-defined]
    if fails:
        with pytest.raises(RuntimeError, match="interrupted"):
            run.fit(module, loader())
    else:
        run.fit(module, loader())
    optimizer = run.optimizers[0]
    # The package's own watch for rates of 0 goes, too.
    assert len(optimizer._optimizer_step_pre_hooks) < max(hooks[0], 1)
    assert not optimizer._optimizer_step_post_hooks
    layerwise = Layerwise.of(optimizer)
    assert layerwise is None or not layerwise.observers


class WaitsInside(TorchDispatchMode):
    """Counts operations that would wait for a device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


class Waits(TorchFunctionMode):
    """Counts calls that would wait for a device, some of which become no operation on a CPU."""

    asked = frozenset({Tensor.tolist, Tensor.cpu, Tensor.numpy, Tensor.nonzero})

    def __init__(self) -> None:
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in self.asked
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("strategy", ["auto", "layerwise"])
def test_between_its_logs_nothing_waits_for_the_device(strategy: str) -> None:
    class Silent(LitTokens):
        def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
            return self._loss(batch)

    class Counts(L.Callback):
        def __init__(self) -> None:
            self.waits: list[int] = []

        def on_train_batch_start(self, *_: Any) -> None:
            self.modes = Waits(), WaitsInside()
            for mode in self.modes:
                mode.__enter__()

        def on_train_batch_end(self, *_: Any) -> None:
            for mode in self.modes:
                mode.__exit__(None, None, None)
            self.waits.append(sum(mode.count for mode in self.modes))

    def counted(*monitors: L.Callback) -> list[int]:
        torch.manual_seed(0)
        counts = Counts()
        # SGD itself does not wait; in the first steps the layerwise engine looks whether it couples parameters.
        module = Silent(optim="sgd", lr=0.1)
        fit(module, callbacks=[*monitors, counts], max_steps=10, log_every_n_steps=5, strategy=strategy)
        return counts.waits

    monitored, alone = counted(OptimizerMonitor()), counted()
    assert monitored[:4] + monitored[5:9] == alone[:4] + alone[5:9]
    assert monitored[4] > alone[4], "it waits when it logs, so the test would see it"
    assert alone[5:9] == [0] * 4


# --- loggers ---------------------------------------------------------------------------------------------------------


def test_loggers_and_the_progress_bar(tmp_path: Path) -> None:
    boards, table = TensorBoardLogger(tmp_path, "boards"), CSVLogger(tmp_path, "table")
    monitor = OptimizerMonitor(per="layer", prog_bar=["lr", "grad_norm"], log_histograms=True)
    module = tokens("adamw_torch_layerwise")
    _, run = fit(module, monitor, logger=[boards, table], log_every_n_steps=3)
    last = list(by_hand())[-1]
    assert {"optim/lr", "optim/grad_norm"} == {key for key in run.progress_bar_metrics if key.startswith("optim")}
    text = Path(table.experiment.metrics_file_path).read_text()
    assert "optim/update_ratio/model.head" in text
    assert f"{run.callback_metrics['optim/grad_norm'].item():.5f}"[:6] in text
    boards.experiment.flush()
    events = EventAccumulator(str(boards.log_dir), size_guidance={"histograms": 0})
    events.Reload()
    scalars = events.Scalars("optim/grad_norm")
    assert [event.step for event in scalars] == [2, 5]
    assert scalars[-1].value == pytest.approx(last["grad_norm"][""], rel=2e-5)
    for what, square in (("gradients", last["grad_norm"]["model.head"] ** 2), ("weights", None)):
        histograms = events.Histograms(f"optim/{what}/model.head")
        assert [event.step for event in histograms] == [2, 5]
        counted = histograms[-1].histogram_value
        assert counted.num == sum(counted.bucket) == sum(p.numel() for p in module.model.head.parameters())
        if square is not None:
            assert counted.sum_squares == pytest.approx(square, rel=1e-4)
        else:
            weights = torch.cat([p.detach().flatten() for p in module.model.head.parameters()])
            edges = [-math.inf, *counted.bucket_limit]
            for low, high, count in zip(edges, counted.bucket_limit, counted.bucket, strict=False):
                inside = ((weights >= low) & (weights < high)).sum() if abs(high) > 1e-9 else None
                assert inside is None or inside == count, (low, high)


def test_lightnings_other_package() -> None:
    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = TokenModel()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.model(batch[0]).flatten(0, 1), batch[1].flatten())

        def configure_optimizers(self) -> Any:
            return build_optimizer(self.model, "adamw_torch", lr=LR)

    torch.manual_seed(0)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    monitor: Any = OptimizerMonitor(every_n_steps=2, prog_bar=["grad_norm"])
    run = pl.Trainer(accelerator="cpu", max_steps=STEPS, enable_model_summary=False, callbacks=[monitor], **quiet)
    run.fit(Module(), loader())
    *_, last = by_hand()
    assert run.callback_metrics["optim/grad_norm"] == pytest.approx(last["grad_norm"][""], rel=2e-5)


# --- refusals --------------------------------------------------------------------------------------------------------


def wrong() -> Iterator[tuple[dict[str, Any], str]]:
    yield {"every_n_steps": 0}, "every_n_steps=0"
    yield {"per": "tensor"}, "'group', 'layer'"
    yield {"metrics": ["norm"]}, "'grad_norm'"
    yield {"prog_bar": ["grad"]}, "'grad_norm'"
    yield {"prog_bar": ["lr"], "metrics": ["grad_norm"]}, "not among metrics"
    yield {"copy_mb": 0}, "update_ratio"


@pytest.mark.parametrize(("arguments", "text"), list(wrong()))
def test_wrong_arguments(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidOption, match=text):
        OptimizerMonitor(**arguments)


def test_histograms_need_tensorboard(tmp_path: Path) -> None:
    with pytest.raises(IncompatibleTrainer, match=r"TensorBoardLogger\('logs'\)"):
        fit(tokens(), OptimizerMonitor(log_histograms=True), logger=CSVLogger(tmp_path))


def test_an_interval_of_never() -> None:
    with pytest.raises(IncompatibleTrainer, match="every_n_steps=50"):
        fit(tokens(), OptimizerMonitor(), log_every_n_steps=0)


def test_values_that_go_nowhere() -> None:
    with pytest.warns(UserWarning, match="callback_metrics only"):
        fit(tokens(), logger=False)
