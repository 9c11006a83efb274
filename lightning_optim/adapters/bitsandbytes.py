"""bitsandbytes optimizers whose bits are chosen per param group.

bitsandbytes lets a parameter keep 32-bit states through ``GlobalOptimManager``, a process-wide table keyed by (group
index, parameter index): an override meant for one optimizer also hits the next one built. Here the param group says it
(``optim_bits``), and the manager is not consulted.
"""

from __future__ import annotations

from typing import Any

from bitsandbytes import optim

from lightning_optim.optimizers.foreign import check_state

# What bitsandbytes' own get_config assumes where a group lacks the key.
_GROUP_DEFAULTS = {"betas": (0.9, 0.999), "eps": 1e-8, "alpha": 0.0, "t_alpha": None, "t_beta3": None}


class _BitsPerGroup:
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
        """Loads as upstream does.

        Raises:
            InvalidOption: If another optimizer saved it.
        """
        super().load_state_dict(state_dict, *args, **kwargs)  # type: ignore[misc]
        check_state(self, ("state1",))  # type: ignore[arg-type]


class AdamW(_BitsPerGroup, optim.AdamW):
    """``bitsandbytes.optim.AdamW``; a param group's ``optim_bits`` overrides the constructor's."""


class Lion(_BitsPerGroup, optim.Lion):
    """``bitsandbytes.optim.Lion``; a param group's ``optim_bits`` overrides the constructor's."""


class AdEMAMix(_BitsPerGroup, optim.AdEMAMix):
    """``bitsandbytes.optim.AdEMAMix``; a param group's ``optim_bits`` overrides the constructor's."""


class RMSprop(_BitsPerGroup, optim.RMSprop):
    """``bitsandbytes.optim.RMSprop``; a param group's ``optim_bits`` overrides the constructor's."""
