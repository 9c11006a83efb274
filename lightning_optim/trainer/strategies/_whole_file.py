"""Reading a checkpoint of whole tensors, one file, where parameters are sharded.

Lightning's ``ModelParallelStrategy`` takes the number of a state in such a file for its parameter's number in the
model. That is so in the files that it writes itself. In those of every other strategy it is the number in the param
groups, so that a state would go to another parameter where there are several groups; and torch refuses to distribute
the state of an optimizer that has none. Here optimizers read their states as on one device, by position, each process
the part that is its own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.optim import Optimizer

from lightning_optim.errors import InvalidOption
from lightning_optim.files import check_file, raise_explained
from lightning_optim.stepping import spread_state
from lightning_optim.trainer.strategies._whole_folder import check_folder

if TYPE_CHECKING:
    _Base = ModelParallelStrategy
else:
    _Base = object


class ReadsWholeFiles(_Base):
    """Mixin for our strategies."""

    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return load_whole(self, super().load_checkpoint, checkpoint_path, *args, **kwargs)


def read_whole_files(strategy: ModelParallelStrategy) -> None:
    """Makes a strategy of Lightning's read whole files as ours do."""
    if isinstance(strategy, ReadsWholeFiles) or "load_checkpoint" in vars(strategy):
        return
    load = strategy.load_checkpoint

    def load_checkpoint(self: ModelParallelStrategy, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return load_whole(self, load, checkpoint_path, *args, **kwargs)

    strategy.load_checkpoint = MethodType(load_checkpoint, strategy)  # type: ignore[method-assign]


def load_whole(
    strategy: ModelParallelStrategy,
    load: Callable[..., dict[str, Any]],
    checkpoint_path: Any,
    *args: Any,
    **kwargs: Any,
) -> dict[str, Any]:
    """Loads a checkpoint by Lightning's method, but optimizer states of a single file as on one device.

    Raises:
        UnreadableCheckpoint: If it is not whole, or none.
        InvalidOption: If the file has no optimizer states, or those of other optimizers or another model.
    """
    path, optimizers = Path(strategy.broadcast(checkpoint_path)), [*strategy.optimizers]
    if path.is_file():
        check_file(path)
    else:
        check_folder(strategy, path)
    try:
        return _load_checked(strategy, load, path, optimizers, *args, **kwargs)
    except Exception as error:
        raise_explained(path, error)


def _load_checked(
    strategy: ModelParallelStrategy,
    load: Callable[..., dict[str, Any]],
    path: Path,
    optimizers: list[Optimizer],
    *args: Any,
    **kwargs: Any,
) -> dict[str, Any]:
    if not optimizers or not path.is_file():
        return load(path, *args, **kwargs)
    # It loads into those that the strategy has.
    strategy.optimizers.clear()
    try:
        checkpoint = load(path, *args, **kwargs)
    finally:
        strategy.optimizers.extend(optimizers)
    states = checkpoint.get("optimizer_states", ())
    if len(states) != len(optimizers):
        raise InvalidOption(
            f"{path} holds the states of {len(states)} optimizers, and {len(optimizers)} would read them. Resume from "
            "a file that was saved by such a training with save_weights_only=False, or start anew from its weights: "
            "LitModel.load_from_checkpoint(path).",
            code="LO814",
        )
    assert strategy.model is not None
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict(spread_state(optimizer, _by_position(state, optimizer, strategy.model)))
    return checkpoint


def _by_position(state: dict[str, Any], optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """Returns a state whose groups list their parameters as the optimizer's do.

    ``ModelParallelStrategy`` writes them in the order of the model.
    """
    groups = state["param_groups"]
    listed = [identity for group in groups for identity in group["params"]]
    number = {parameter: index for index, parameter in enumerate(model.parameters())}
    own = [[number.get(parameter, -1) for parameter in group["params"]] for group in optimizer.param_groups]
    if listed == [*range(len(listed))] or [sorted(group["params"]) for group in groups] != [*map(sorted, own)]:
        return state
    return {**state, "param_groups": [{**group, "params": ids} for group, ids in zip(groups, own, strict=True)]}
