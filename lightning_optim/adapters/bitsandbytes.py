"""bitsandbytes optimizers whose bits are chosen per param group, and that leave parameters where they lie in memory.

bitsandbytes lets a parameter keep 32-bit states through ``GlobalOptimManager``, a process-wide table keyed by (group
index, parameter index): an override meant for one optimizer also hits the next one built. Here the param group says it
(``optim_bits``), and the manager is not consulted.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes import optim
from torch import Tensor

from lightning_optim.optimizers.uncompiled import StepsUncompiled

# What bitsandbytes' own get_config assumes where a group lacks the key.
_GROUP_DEFAULTS = {"betas": (0.9, 0.999), "eps": 1e-8, "alpha": 0.0, "t_alpha": None, "t_beta3": None}


class _BitsPerGroup(StepsUncompiled):
    """Reads an update's configuration from the param group and from this optimizer alone."""

    args: Any

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        config = {key: group.get(key, default) for key, default in _GROUP_DEFAULTS.items()}
        config.update(lr=group["lr"], weight_decay=group["weight_decay"])
        config.update(vars(self.args))
        config["optim_bits"] = group.get("optim_bits", config["optim_bits"])
        return config

    def check_overrides(self) -> None:
        """Ignores the process-wide overrides."""

    def load_state_dict(self, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Loads as upstream does, and runs the hooks that torch runs and upstream leaves out."""
        optimizer: Any = self
        for before in optimizer._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        super().load_state_dict(state_dict, *args, **kwargs)
        for after in optimizer._optimizer_load_state_dict_post_hooks.values():
            after(self)


class _KeepsLayout:
    """Steps a contiguous copy of a parameter that is not contiguous (channels_last, transposed) and writes it back.

    Upstream leaves the copy in the parameter's place: the layout that the user chose is lost in the first step, and a
    resumed run, which begins with the user's layout again, rounds otherwise than the one that went on.
    """

    def update_step(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        own = p.data
        super().update_step(group, p, gindex, pindex)  # type: ignore[misc]
        if not own.is_contiguous():
            own.copy_(p.data)
            p.data = own

    def get_state_buffer(self, p: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns zeros in the order of the copy: kernels for a GPU walk over the memory of both."""
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
