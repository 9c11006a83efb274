"""State that another optimizer saved."""

from __future__ import annotations

from functools import partial

from torch.optim import Optimizer

from lightning_optim.errors import InvalidOption


def refuse_foreign_state(optimizer: Optimizer, buffers: tuple[str, ...]) -> None:
    """Makes torch's ``load_state_dict`` refuse state without the tensors that this optimizer keeps.

    It loads whatever it is given: the first step would fail, or begin anew in silence.

    Args:
        optimizer: One whose ``load_state_dict`` is torch's.
        buffers: Keys that the state of every parameter has that was ever stepped.

    Raises:
        InvalidOption: When such a state is loaded.
    """
    optimizer.register_load_state_dict_post_hook(partial(check_state, buffers=buffers))


def check_state(optimizer: Optimizer, buffers: tuple[str, ...]) -> None:
    """Raises :class:`InvalidOption` if the state of a parameter that was stepped lacks one of ``buffers``."""
    for state in optimizer.state.values():
        if state and not set(buffers) <= set(state):
            raise InvalidOption(
                f"the state in the checkpoint is another optimizer's: it has {', '.join(map(str, state))}, and "
                f"{type(optimizer).__name__} keeps {', '.join(buffers)}. Resume with the optimizer that saved it (with "
                "optim_fallback=True that may be another than the one asked for), or start anew: "
                "LitModel.load_from_checkpoint(path) reads the weights."
            )
