"""Shards a module that does not say how: its numbered blocks, and what is left of each submodule."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import DoublePrecision, MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import nn

from lightning_optim.errors import IncompatibleTrainer, InvalidOption, InvalidParamGroups
from lightning_optim.groups import NamedParameter, named_parameters, numbered_stacks
from lightning_optim.trainer import _packages as packages

if TYPE_CHECKING:
    _Base = ModelParallelStrategy
else:
    _Base = object

# Autocast leaves their weights and running statistics in float32.
_KEPT_IN_FLOAT32 = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class ShardsBlocks(_Base):
    """Mixin for a strategy under which ``configure_model`` may be left out."""

    #: Regular expression for the names of the modules to shard by themselves; ``None`` finds numbered blocks.
    shard: str | None = None

    def setup_environment(self) -> None:
        if isinstance(self.precision_plugin, packages.kin(DoublePrecision)):
            # Lightning refuses it where the strategy is given as an object, and not where it is given as a flag.
            raise IncompatibleTrainer(
                f"precision='64-true' under {type(self).__name__}, which Lightning's ModelParallelStrategy does not "
                "support. Use '32-true', or Trainer(strategy='ddp').",
                code="LO722",
            )
        super().setup_environment()
        module = self.lightning_module
        assert module is not None
        if not shards_itself(module, self.shard):
            # Lightning calls it where parameters may be sharded, and refuses modules without.
            module.configure_model = partial(  # type: ignore[method-assign]
                shard_blocks, module, self.shard, self._autocast
            )

    @property
    def _autocast(self) -> torch.dtype | None:
        precision = self.precision_plugin
        if not isinstance(precision, packages.kin(MixedPrecision)):
            return None
        return torch.float16 if precision.precision == "16-mixed" else torch.bfloat16


def shards_itself(module: LightningModule, pattern: str | None) -> bool:
    """Whether a module has a ``configure_model`` of its own.

    Raises:
        InvalidOption: If it has, and there is a pattern, too.
    """
    own = vars(module).get("configure_model")
    ours = isinstance(own, partial) and own.func is shard_blocks
    if ours or not packages.is_overridden("configure_model", module):
        return False
    if pattern is not None:
        raise InvalidOption(
            f"shard={pattern!r} says what to shard, and so does configure_model of {type(module).__name__}: leave one "
            "of the two out",
            code="LO721",
        )
    return True


def shard_blocks(module: LightningModule, pattern: str | None = None, autocast: torch.dtype | None = None) -> None:
    """Shards blocks by ``fully_shard``, each by itself, and then what is left of each submodule.

    Args:
        module: Has a device mesh.
        pattern: Regular expression for the names of the modules to shard by themselves; ``None`` finds numbered blocks.
        autocast: The dtype that forward is autocast to: parameters are gathered in it, and gradients reduced in
            float32. ``None`` gathers and reduces in the parameters' own dtype.

    Raises:
        IncompatibleTrainer: If there are no numbered blocks, parameters that belong to no submodule, or one of several
            that are sharded apart.
        InvalidOption: If the pattern is no regular expression, or matches no module.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    modules = dict(module.named_modules())
    if any(isinstance(each, FSDPModule) for each in modules.values()):
        return
    if direct := [name for name, _ in module.named_parameters(recurse=False)]:
        raise IncompatibleTrainer(
            f"{direct[0]!r} is a parameter of {type(module).__name__} itself, and only what submodules have can be "
            "sharded without configure_model: move it into the submodule that uses it, or write configure_model",
            code="LO720",
        )
    names = _numbered(module) if pattern is None else _named(module, pattern)
    rest = list(_rest(module, "", set(names)))
    # The innermost first, as fully_shard wants it.
    units = [*sorted(names, key=lambda name: -name.count(".")), *rest]
    _refuse_ties(module, units)
    assert module.device_mesh is not None
    mesh = module.device_mesh["data_parallel"]
    policy = MixedPrecisionPolicy()
    if autocast is not None:
        # Inputs are left to autocast, or sums along the blocks would be rounded at each.
        policy = MixedPrecisionPolicy(param_dtype=autocast, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for each in modules.values():
            if isinstance(each, _KEPT_IN_FLOAT32):
                fully_shard(each, mesh=mesh)
    for name in units:
        fully_shard(modules[name], mesh=mesh, mp_policy=policy)
    rank_zero_info(
        f"{type(module).__name__} has no configure_model: {len(names)} modules are sharded by themselves "
        f"({names[0]!r} to {names[-1]!r}), and the rest of {', '.join(map(repr, rest)) or 'nothing'} together."
    )


def _refuse_ties(module: nn.Module, units: list[str]) -> None:
    """Refuses a parameter of modules that are sharded apart: each would make one of its own of it, and train that."""
    first: dict[nn.Parameter, tuple[str, str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        unit = next((unit for unit in units if name.startswith(f"{unit}.")), "")
        other, tied = first.setdefault(parameter, (unit, name))
        if unit != other:
            raise IncompatibleTrainer(
                f"{tied!r} and {name!r} are one parameter, and {other!r} and {unit!r}, which are sharded apart, would "
                "each train one of its own: put both into a submodule that calls them and name that by the strategy's "
                "option shard, or write configure_model",
                code="LO723",
            )


def _rest(module: nn.Module, prefix: str, sharded: set[str]) -> Iterator[str]:
    """Yields the names of submodules that have parameters and are not sharded by themselves."""
    for name, child in module.named_children():
        if prefix + name in sharded or not any(True for _ in child.parameters()):
            continue
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            # Nobody calls these, so that nothing would be gathered.
            yield from _rest(child, f"{prefix}{name}.", sharded)
        else:
            yield prefix + name


def _named(module: LightningModule, pattern: str) -> list[str]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise InvalidOption(f"shard={pattern!r} is not a regular expression: {error}", code="LO303") from error
    named = ((name, each) for name, each in module.named_modules() if name and expression.fullmatch(name))
    found = [name for name, each in named if any(True for _ in each.parameters())]
    if not found:
        raise InvalidOption(
            f"shard={pattern!r} is the whole name of no module of {type(module).__name__} that has parameters, such as "
            f"{next((name for name, _ in module.named_children()), '')!r}",
            code="LO721",
        )
    return found


def _numbered(module: LightningModule) -> list[str]:
    parameters: list[NamedParameter] = []
    with suppress(InvalidParamGroups):  # nothing is trainable
        parameters = named_parameters(module)
    found: dict[str, None] = {}
    for prefix in numbered_stacks(parameters):
        for parameter in parameters:
            if match := re.match(rf"{re.escape(prefix)}\d+(?=\.)", parameter.name):
                found[match.group()] = None
    if not found:
        raise IncompatibleTrainer(
            f"{type(module).__name__} has no configure_model and no numbered blocks to shard (an nn.ModuleList or "
            "nn.Sequential of blocks). Name modules by the strategy's option shard, such as shard=r'encoder|decoder', "
            "or write configure_model",
            code="LO720",
        )
    return list(found)
