"""What ``lightning_optim._compat.lightning`` relies on does what it is relied on for; see ``test_compat.py``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins import MixedPrecision, TorchCheckpointIO, XLAPrecision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, XLAStrategy
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

from tests.compat.contract import relied_on
from tests.models import ForeignTokens, LitTokens, loader, trainer


class Asks(Callback):
    """Calls a function in the hook of the given name, and keeps what it returns."""

    def __init__(self, hook: str, ask: Any) -> None:
        self.answers: list[Any] = []
        setattr(self, hook, lambda trainer, module, *_, **__: self.answers.append(ask(trainer, module)))


def asked(hook: str, ask: Any, **flags: Any) -> list[Any]:
    """Trains four batches and validates; returns what ``ask`` returned each time that ``hook`` ran."""
    asks = Asks(hook, ask)
    trainer(max_epochs=1, callbacks=[asks], **flags).fit(LitTokens(optim="sgd", lr=0.1), loader(4), loader(1))
    return asks.answers


# --- Trainer and loops -----------------------------------------------------------------------------------------------


def test_a_resumed_checkpoint_is_known_while_optimizers_are_made(tmp_path: Path) -> None:
    with relied_on("lightning.loaded_checkpoint", "every callback that resumes") as loaded_checkpoint:

        class Looks(ForeignTokens):
            def configure_optimizers(self) -> Any:
                found.append(loaded_checkpoint(self.trainer).get("global_step"))
                return super().configure_optimizers()

        found: list[Any] = []
        run = trainer(max_steps=2)
        run.fit(Looks(), loader())
        run.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
        trainer(max_steps=3).fit(Looks(), loader(), ckpt_path=tmp_path / "a.ckpt")
        assert found == [None, 2]


def test_the_trainer_that_calls_is_found() -> None:
    with relied_on("lightning.running_trainer", "the warning for what build_optimizer makes") as running_trainer:
        assert running_trainer() is None
        assert asked("on_train_start", lambda trainer, _: running_trainer() is trainer) == [True]

        class Looks(ForeignTokens):
            def configure_optimizers(self) -> Any:
                found.append(running_trainer() is self.trainer)
                return super().configure_optimizers()

        found: list[bool] = []
        trainer(max_steps=1).fit(Looks(), loader())
        assert found == [True]


class GoesOn(DataLoader[Any]):
    """Goes on where it was, as torchdata's StatefulDataLoader does: from the moment its iterator is made."""

    done = 0

    def __iter__(self) -> Any:
        # At the end of an epoch there is nothing to skip in the next.
        self.done, skipped = 0, self.done % len(self)
        batches = list(super().__iter__())[skipped:]
        return map(self._count, batches, range(skipped + 1, skipped + 1 + len(batches)))

    def _count(self, batch: Any, done: int) -> Any:
        self.done = done
        return batch

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]


def test_data_that_were_made_before_the_checkpoint_was_read_go_on(tmp_path: Path) -> None:
    with relied_on("lightning.restore_data", "resuming within an epoch with a schedule") as restore_data:

        class Early(ForeignTokens):
            def configure_optimizers(self) -> Any:
                assert self.trainer.estimated_stepping_batches == 4
                return super().configure_optimizers()

        def run(path: Path | None, restores: bool) -> list[Any]:
            batches: list[Any] = []
            keeps = Callback()
            keeps.on_train_start = lambda trainer, _: restore_data(trainer) if restores else None  # type: ignore[assignment]
            keeps.on_train_batch_start = lambda _, __, batch, ___: batches.append(batch[0])  # type: ignore[assignment]
            save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
            fit = trainer(max_epochs=1, callbacks=[keeps, save], enable_checkpointing=True)
            fit.fit(Early(), GoesOn(loader(4).dataset, batch_size=16), ckpt_path=path)
            return batches

        whole = run(None, True)
        assert [torch.equal(run(tmp_path / "step=3.ckpt", restores)[0], whole[3]) for restores in (True, False)] == [
            True,
            False,
        ]


def test_accumulation_is_known_after_each_backward() -> None:
    with relied_on("lightning.is_accumulating", "layerwise_ddp with accumulation") as is_accumulating:
        answers = asked("on_after_backward", lambda trainer, _: is_accumulating(trainer), accumulate_grad_batches=3)
        assert answers == [True, True, False, False]


def test_the_step_number_of_what_is_logged_is_known() -> None:
    with relied_on("lightning.logged_step", "OptimizerMonitor") as logged_step:
        answers = asked("on_train_batch_end", lambda trainer, _: logged_step(trainer), accumulate_grad_batches=2)
        assert answers == [0, 0, 1, 1]


def test_what_loops_logged_and_read_is_known() -> None:
    needed_by = "reduce_lr_on_plateau and the hint of grokadamw"
    with relied_on("lightning.logged_results", needed_by) as logged_results:
        training = lambda trainer, _: list(logged_results(trainer.fit_loop.epoch_loop))  # noqa: E731
        assert "training_step.train_loss" in asked("on_train_batch_end", training)[0]
        validation = lambda trainer, _: list(logged_results(trainer.fit_loop.epoch_loop.val_loop))  # noqa: E731
        assert "validation_step.val_loss" in asked("on_validation_end", validation)[-1]
    with relied_on("lightning.has_data", needed_by) as has_data:
        assert asked("on_train_batch_end", lambda trainer, _: has_data(trainer.fit_loop.epoch_loop.val_loop))[-1]
        asks = Asks("on_train_batch_end", lambda trainer, _: has_data(trainer.fit_loop.epoch_loop.val_loop))
        trainer(max_steps=1, callbacks=[asks]).fit(ForeignTokens(), loader())
        assert asks.answers == [False]


def test_what_configure_optimizers_returns_is_taken_apart() -> None:
    with relied_on("lightning.take_apart", "OptimCallback and lr_scheduler='module'") as take_apart:
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))])
        schedule = StepLR(optimizer, 1)
        assert take_apart(optimizer) == ([optimizer], [], None)
        given = {"optimizer": optimizer, "lr_scheduler": schedule, "monitor": "loss"}
        assert take_apart(given) == ([optimizer], [schedule], "loss")
        optimizers, schedules, _ = take_apart({"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule}})
        assert (optimizers, schedules[0]["scheduler"]) == ([optimizer], schedule)
        assert take_apart(([optimizer], [schedule]))[:2] == ([optimizer], [schedule])


def test_finders_say_whether_they_set_the_rate() -> None:
    with relied_on("lightning.finder_sets_rate", "OptimCallback with a LearningRateFinder") as finder_sets_rate:
        assert finder_sets_rate(LearningRateFinder(update_attr=True)) is True
        assert finder_sets_rate(LearningRateFinder(update_attr=False)) is False


# --- module ----------------------------------------------------------------------------------------------------------


def test_loggers_are_told_of_changed_hyperparameters() -> None:
    with relied_on("lightning.note_hyperparameters", "the report in hparams.yaml") as note_hyperparameters:
        module = LitTokens(optim="sgd")
        module.hparams["width"] = 65
        assert module.hparams_initial["width"] == 64
        note_hyperparameters(module)
        assert module.hparams_initial["width"] == 65
        module.hparams["width"] = 66
        assert module.hparams_initial["width"] == 65


def test_the_hook_before_the_transfer_is_called() -> None:
    with relied_on("lightning.before_batch_transfer", "bn_batches of schedule-free optimizers") as before:

        class Adds(LitTokens):
            def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
                return batch + 1 + dataloader_idx

        asks = Asks("on_train_start", lambda _, module: before(module, torch.ones(1)))
        with pytest.raises(TypeError):  # what the loader yields is no tensor
            trainer(max_steps=1, callbacks=[asks]).fit(Adds(optim="sgd"), loader())
        assert asks.answers == [torch.tensor([2.0])]


def test_a_class_method_refuses_an_instance() -> None:
    with relied_on("lightning.restricted_classmethod", "load_from_checkpoint") as restricted_classmethod:

        class Has:
            made = restricted_classmethod(lambda cls: cls.__name__)

        assert Has.made() == "Has"
        with pytest.raises(TypeError, match="cannot be called on an instance"):
            Has().made()


# --- strategies and plugins ------------------------------------------------------------------------------------------


def test_the_strategy_that_a_trainer_would_choose() -> None:
    with relied_on("lightning.chosen_strategy", "OptimCLI with a layerwise name") as chosen_strategy:
        assert isinstance(chosen_strategy({"accelerator": "cpu", "devices": 1}), SingleDeviceStrategy)
        assert isinstance(chosen_strategy({"accelerator": "cpu", "devices": 2}), DDPStrategy)
    with relied_on("lightning.is_start_method_popen", "OptimCLI with a layerwise name") as is_start_method_popen:
        assert is_start_method_popen(DDPStrategy())
        assert not is_start_method_popen(DDPStrategy(start_method="fork"))


def test_a_strategy_takes_another_device() -> None:
    with relied_on("lightning.set_root_device", "the strategies for one device") as set_root_device:
        strategy = SingleDeviceStrategy("cpu")
        set_root_device(strategy, torch.device("meta"))
        assert strategy.root_device == torch.device("meta")


def test_data_parallelism_takes_what_tensor_parallelism_leaves() -> None:
    with relied_on("lightning.data_parallel_takes_the_rest", "layerwise_fsdp2") as takes_the_rest:
        strategy = ModelParallelStrategy(data_parallel_size="auto", tensor_parallel_size=2)
        strategy.parallel_devices = [torch.device("cpu")] * 6
        takes_the_rest(strategy)
        assert strategy._data_parallel_size == 3
        given = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=2)
        takes_the_rest(given)
        assert given._data_parallel_size == 2


def test_what_writes_folders_is_known() -> None:
    with relied_on("lightning.saves_shards", "fsdp2, which writes distributed checkpoints beside,") as saves_shards:
        assert saves_shards(ModelParallelStrategy())
        assert not saves_shards(ModelParallelStrategy(save_distributed_checkpoint=False))


def test_what_stands_for_no_optimizer() -> None:
    with relied_on("lightning.MockOptimizer", "strategy='fused'") as mock:

        class Nothing(ForeignTokens):
            def configure_optimizers(self) -> None:
                return None

        run = trainer(max_steps=1)
        run.fit(Nothing(), loader())
        assert [type(optimizer) for optimizer in run.optimizers] == [mock]


def test_a_reader_of_checkpoints_wraps_another() -> None:
    with relied_on("lightning.WrappingCheckpointIO", "reading old checkpoints under XLA") as wrapping:

        class Wraps(wrapping):  # type: ignore[misc, valid-type]
            def save_checkpoint(self, *args: Any, **kwargs: Any) -> None: ...
            def load_checkpoint(self, *args: Any, **kwargs: Any) -> Any: ...

        wrapped = Wraps(TorchCheckpointIO())
        assert isinstance(wrapped.checkpoint_io, TorchCheckpointIO)


@pytest.fixture
def process_group(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)


@pytest.mark.usefixtures("process_group")
def test_ranks_begin_alike() -> None:
    """That they do with two processes: tests/trainer/test_layerwise_ddp.py."""
    with relied_on("lightning.sync_module_states", "layerwise_ddp") as sync_module_states:
        sync_module_states(nn.BatchNorm1d(2))


@pytest.mark.usefixtures("process_group")
def test_hooks_of_ddp_are_registered_for_any_device() -> None:
    with relied_on("lightning.WrapsForAnyDevice", "npu_ddp") as wraps_for_any_device:

        class Hooked(wraps_for_any_device, DDPStrategy):  # type: ignore[misc, valid-type]
            def determine_ddp_device_ids(self) -> None:
                return None

        called: list[Any] = []
        hook = lambda state, bucket: (called.append(state), _unchanged(bucket))[1]  # noqa: E731
        strategy = Hooked(ddp_comm_state="state", ddp_comm_hook=hook, bucket_cap_mb=1)
        strategy.model = strategy._setup_model(nn.Linear(2, 1))
        strategy._register_ddp_hooks()
        strategy.model(torch.ones(1, 2)).sum().backward()
        assert called == ["state"]


def _unchanged(bucket: Any) -> torch.futures.Future[Tensor]:
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def test_one_xla_device_starts_no_process() -> None:
    with relied_on("lightning.StartsNoneAlone", "the XLA strategies") as mixin:
        launched: list[int] = []

        class Launches:
            num_processes = 1

            def _configure_launcher(self) -> None:
                launched.append(self.num_processes)

        strategy = type("Alone", (mixin, Launches), {})()
        strategy._configure_launcher()
        strategy.num_processes = 2
        strategy._configure_launcher()
        assert launched == [2]
        assert callable(XLAStrategy._configure_launcher)


def test_gradients_are_reduced_by_a_method_of_their_own() -> None:
    with relied_on("lightning.ReducesXLA", "precision under the XLA strategies") as reduces:
        assert issubclass(reduces, XLAPrecision)
        made = object.__new__(type("Counts", (reduces,), {"closure_and_reduction": lambda self, *given: given}))
        assert made._xla_wrap_closure("optimizer", "closure") == ("optimizer", "closure")
        assert callable(XLAPrecision._xla_wrap_closure)


def test_a_plugin_runs_what_follows_the_closure() -> None:
    with relied_on("lightning.after_closure", "strategy='fused' with precision='16-mixed'") as after_closure:
        seen: list[str] = []

        class Plugin(MixedPrecision):
            def optimizer_step(self, optimizer: Any, model: Any, closure: Any, **kwargs: Any) -> Any:
                loss = closure()
                after_closure(self, model, optimizer)
                return loss

        class Hooked(LitTokens):
            def on_before_optimizer_step(self, optimizer: Any) -> None:
                seen.append("hook")

            def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
                assert isinstance(optimizer, (LightningOptimizer, torch.optim.Optimizer))
                seen.append("clipping")

        trainer(max_steps=1, plugins=[Plugin("bf16-mixed", "cpu")]).fit(Hooked(optim="sgd"), loader())
        assert seen == ["hook", "clipping"]


# --- command line ----------------------------------------------------------------------------------------------------


def test_a_cli_hands_out_the_parser_of_a_subcommand() -> None:
    cli = LightningCLI(LitTokens, run=False, args=[])
    with relied_on("lightning.subcommand_parser", "OptimCLI together with --optimizer") as subcommand_parser:
        assert subcommand_parser(cli, None).get_defaults().model.width == 64


def test_a_parser_hands_out_its_arguments() -> None:
    with relied_on("jsonargparse.actions", "OptimCLI together with add_optimizer_args") as actions:
        parser = argparse.ArgumentParser()
        added = parser.add_argument("--lr", required=True)
        assert added in actions(parser)
        added.required = False
        assert parser.parse_args([]).lr is None
