"""bitsandbytes optimizers with bits per param group that keep their parameters' memory layout.

In bitsandbytes a parameter keeps 32-bit states through ``GlobalOptimManager``, which upstream's optimizers look up by
(group index, parameter index): an override for one optimizer also hits the next one built, and every bucket of a
layerwise one. Here the param group's ``optim_bits`` decides, and the manager is looked up by the parameter itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_optim._compat.bitsandbytes import quietly
from lightning_optim._compat.torch import load_hooks
from lightning_optim.errors import InvalidOption
from lightning_optim.stepping import StepsUncompiled

with quietly():
    from bitsandbytes import optim
    from bitsandbytes.functional import GlobalPageManager

# What its constructor sets and Optimizer.__getstate__ leaves out.
_ATTRIBUTES = ("initialized", "name2qmap", "is_paged", "non_castable_tensor_keys", "args", "optimizer_name")
# Upstream get_config's defaults for keys that a group lacks.
_GROUP_DEFAULTS = {"betas": (0.9, 0.999), "eps": 1e-8, "alpha": 0.0, "t_alpha": None, "t_beta3": None}


class _BitsPerGroup(StepsUncompiled):
    """Reads an update's configuration only from the param group and this optimizer."""

    args: Any

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        config = {key: group.get(key, default) for key, default in _GROUP_DEFAULTS.items()}
        config.update(lr=group["lr"], weight_decay=group["weight_decay"])
        config.update(vars(self.args))
        override = _override(group["params"][pindex])
        config["optim_bits"] = override.get("optim_bits", group.get("optim_bits", config["optim_bits"]))
        return config

    def __getstate__(self) -> dict[str, Any]:
        """Returns what a copy needs; upstream's would fail in its first step."""
        return {**super().__getstate__(), **{name: getattr(self, name) for name in _ATTRIBUTES}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # One of each in a process.
        self.mng = optim.GlobalOptimManager.get_instance()
        self.page_mng = GlobalPageManager.get_instance()

    def check_overrides(self) -> None:
        """Refuses, in the first step, overrides that cannot be taken over from ``GlobalOptimManager``.

        Raises:
            InvalidOption: If one changes more than ``optim_bits``: schedules and reports would not know of it.
        """
        for group in self.param_groups:
            for parameter in group["params"]:
                others = sorted(_override(parameter).keys() - {"optim_bits"})
                if others:
                    raise InvalidOption(
                        f"bitsandbytes' GlobalOptimManager overrides {', '.join(others)} of a parameter of shape "
                        f"{tuple(parameter.shape)}; only optim_bits is taken from there. Give the rest by name, "
                        f"param_groups={{'a pattern of its name': {{{others[0]!r}: ...}}}}, and drop the override, or "
                        "clear those of earlier models with GlobalOptimManager.get_instance().initialize().",
                        code="LO217",
                    )

    def load_state_dict(self, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Loads as upstream does, and runs the hooks that torch would run.

        Raises:
            InvalidOption: If torch has lost the states' tensors: upstream nests them in a dict, and what
                ``torch.distributed.checkpoint`` flattens it does not put together again.
        """
        states = [state for state in state_dict.get("state", {}).values() if isinstance(state, dict)]
        if any(value == {} for state in states for value in state.values() if isinstance(value, dict)):
            raise InvalidOption(
                f"the state dict has empty entries for {type(self).__name__}: flatten_optimizer_state_dict=True of "
                "torch.distributed.checkpoint loses what bitsandbytes nests. Save and load with "
                "StateDictOptions(flatten_optimizer_state_dict=False), the default.",
                code="LO815",
            )
        before, after = load_hooks(self)
        for hook in before:
            state_dict = hook(self, state_dict) or state_dict
        super().load_state_dict(state_dict, *args, **kwargs)
        for hook in after:
            hook(self)


def _override(parameter: Tensor) -> dict[str, Any]:
    """Returns what ``GlobalOptimManager`` overrides for this very parameter."""
    manager = optim.GlobalOptimManager.get_instance()
    override = dict(manager.pid2config.get(id(parameter), {}))
    for module, name, config in manager.module_weight_config_triple:
        if getattr(module, name, None) is parameter:
            override.update(config)
    return override


class _KeepsLayout:
    """Steps a contiguous copy of a non-contiguous parameter (channels_last, transposed) and writes it back.

    Upstream leaves the copy in the parameter's place: the user's layout is lost in the first step, and a resumed run,
    which starts with that layout again, rounds differently from an uninterrupted one.
    """

    def update_step(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        own = p.data
        super().update_step(group, p, gindex, pindex)  # type: ignore[misc]
        if not own.is_contiguous():
            own.copy_(p.data)
            p.data = own

    def get_state_buffer(self, p: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns zeros in the layout of the copy: GPU kernels ignore strides."""
        buffer: Tensor = super().get_state_buffer(p, dtype)  # type: ignore[misc]
        return buffer.contiguous()


class AdamW(_KeepsLayout, _BitsPerGroup, optim.AdamW):
    """``bitsandbytes.optim.AdamW``; a param group's ``optim_bits`` overrides the constructor's."""


class Lion(_KeepsLayout, _BitsPerGroup, optim.Lion):
    """``bitsandbytes.optim.Lion``; a param group's ``optim_bits`` overrides the constructor's."""


class AdEMAMix(_KeepsLayout, _BitsPerGroup, optim.AdEMAMix):
    """``bitsandbytes.optim.AdEMAMix``; a param group's ``optim_bits`` overrides the constructor's."""


class RMSprop(_KeepsLayout, _BitsPerGroup, optim.RMSprop):
    """``bitsandbytes.optim.RMSprop``; a param group's ``optim_bits`` overrides the constructor's."""
