"""Which optimizer wrote a state: what param groups record about it, and which states are refused.

torch finds a parameter's state by its position and loads whatever it is given. So every group that we write names the
optimizer, the format of its state and its parameters. Group entries are the one thing that every class stores, copies
and restores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.errors import InvalidOption

#: A group's key for the identifier of the optimizer; without ``_layerwise``, which makes no difference to the state.
IDENTIFIER = "optim"
#: A group's key for the format of the state.
FORMAT = "format"
#: A group's key for the names of its parameters, in order. Not torch's ``param_names``, which requires that all groups
#: have names, including those that a finetuning callback adds.
MEMBERS = "members"
MARKS = (IDENTIFIER, FORMAT, MEMBERS)

_UNNAMED = "<unnamed"
_ANEW = "or start anew from its weights: LitModel.load_from_checkpoint(path)"

Group = Mapping[str, Any]


def refuse_foreign(own: Sequence[Group], saved: Sequence[Group], reader: str, marked_only: bool = False) -> None:
    """Raises :class:`InvalidOption` for groups written by another optimizer, or for other parameters.

    Args:
        own: The groups of the reading optimizer.
        saved: Those of the state dict.
        reader: What to call the optimizer if its groups do not name it.
        marked_only: Also refuses groups without a format; otherwise they pass, because earlier versions, torch and
            plain Lightning write none.
    """
    expected = next((group[FORMAT] for group in own if FORMAT in group), None)
    reader = _called(own, reader)
    for group in saved:
        if FORMAT not in group and not marked_only:
            continue
        if group.get(FORMAT) != expected:
            writer = _called([group], "another optimizer")
            written = f"the format {group[FORMAT]!r}" if FORMAT in group else "an unknown format"
            raise InvalidOption(
                f"{writer} wrote the state in the checkpoint, in {written}; {reader} reads {expected!r}. Resume with "
                f"the optimizer (and the version of lightning_optim) that wrote it, {_ANEW}.",
                code="LO806",
            )
    _refuse_other_parameters(own, saved)


def refuse_other_groups(own: Sequence[Group], saved: Sequence[Group]) -> None:
    """Raises :class:`InvalidOption` for groups of other optimizers or parameters, or of another number."""
    here, there = ({group.get(FORMAT) for group in groups} for groups in (own, saved))
    if here != there and None not in there:
        writers, readers = (
            " and ".join(dict.fromkeys(f"optim={group[IDENTIFIER]!r}" for group in groups)) for groups in (saved, own)
        )
        raise InvalidOption(
            f"{writers} wrote the state in the checkpoint; {readers} would read it. Resume with what wrote it, "
            f"{_ANEW}.",
            code="LO806",
        )
    _refuse_other_parameters(own, saved)
    if len(own) != len(saved):
        raise InvalidOption(
            f"the optimizer's state belongs to other groups: here they are {len(own)}, in the checkpoint {len(saved)}. "
            f"{_SAME}",
            code="LO807",
        )


def _called(groups: Sequence[Group], otherwise: str) -> str:
    return next((f"optim={group[IDENTIFIER]!r}" for group in groups if IDENTIFIER in group), otherwise)


def _refuse_other_parameters(own: Sequence[Group], saved: Sequence[Group]) -> None:
    """States are found by position: with other groups they would go to other parameters."""
    if len(own) != len(saved) and all(MEMBERS in group for group in (*own, *saved)):
        here, there = (", ".join(f"{group.get('name')!r}" for group in groups) for groups in (own, saved))
        raise InvalidOption(
            f"the optimizer's state belongs to other groups: here they are {here}, in the checkpoint {there}. {_SAME}",
            code="LO807",
        )
    if not all(MEMBERS in group for group in (*own, *saved)):
        _refuse_other_sizes(own, saved)
    pairs = [
        (plain_name(here), plain_name(there))
        for mine, theirs in zip(own, saved, strict=False)
        if MEMBERS in mine and MEMBERS in theirs
        for here, there in zip_longest(mine[MEMBERS], theirs[MEMBERS], fillvalue="nothing")
    ]
    other = next(((here, there) for here, there in pairs if here != there), None)
    if other is None or _same_but_for_a_prefix(pairs):
        return
    raise InvalidOption(
        f"the optimizer's state belongs to other groups: {other[0]!r} stands where the checkpoint has {other[1]!r}. "
        f"{_SAME}",
        code="LO807",
    )


def _refuse_other_sizes(own: Sequence[Group], saved: Sequence[Group]) -> None:
    here, there = ([len(group["params"]) for group in groups if "params" in group] for groups in (own, saved))
    if len(here) != len(own) or len(there) != len(saved) or here == there:
        return
    held = ", ".join(f"{group.get('name', 'a group')}: {size}" for group, size in zip(own, here, strict=True))
    raise InvalidOption(
        f"the state in the checkpoint has {len(there)} group(s), of {', '.join(map(str, there))} parameters, and does "
        f"not name them; here they are {len(here)} ({held}). lightning_optim.migrate_state_dict(state_dict, optimizer, "
        f"parameters) gives each parameter its own, {_ANEW}.",
        code="LO807",
    )


_SAME = (
    "Resume with the optim_target_modules, the param_groups and the frozen parameters of the run that wrote it, "
    f"{_ANEW}."
)


def _same_but_for_a_prefix(pairs: Sequence[tuple[str, str]]) -> bool:
    """Whether the names are equal up to the prefix of an enclosing module, or unknown."""
    if any(name.startswith(_UNNAMED) for pair in pairs for name in pair):
        return all(any(name.startswith(_UNNAMED) for name in pair) for pair in pairs)
    for longer, shorter in ((0, 1), (1, 0)):
        prefixes = {pair[longer].removesuffix(pair[shorter]) for pair in pairs}
        if len(prefixes) == 1 and prefixes.pop().endswith("."):
            return True
    return False


def plain_name(name: str) -> str:
    """Returns a parameter's name without torch.compile's additions."""
    return name.replace("_orig_mod.", "")


def check_state(optimizer: Optimizer, state_dict: Mapping[str, Any], kept: Mapping[str, int | None]) -> None:
    """Refuses a state without marks if its tensors show that another optimizer wrote it.

    Args:
        optimizer: The reading optimizer.
        state_dict: What it reads.
        kept: What the state of every parameter that was ever stepped holds, by key: the number of tensors of the
            parameter's shape, or ``None`` for anything else.

    Raises:
        InvalidOption: If a state lacks one of them, or holds it in another size.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    ids = [identity for group in state_dict["param_groups"] for identity in group["params"]]
    for identity, parameter in zip(ids, parameters, strict=False):
        state = _flat(state_dict["state"].get(identity, {}))
        if state and not all(_fits(state.get(key), parameter, copies) for key, copies in kept.items()):
            raise InvalidOption(
                f"the state in the checkpoint is another optimizer's: it has {_described(state)}, and "
                f"{type(optimizer).__name__} keeps {', '.join(kept)}. Resume with the optimizer that saved it (with "
                "optim_fallback=True that may be another than the one asked for), or start anew: "
                "LitModel.load_from_checkpoint(path) reads the weights.",
                code="LO806",
            )


def _flat(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a state without the nested dict into which bitsandbytes puts a part of it."""
    flat: dict[str, Any] = {}
    for key, value in state.items():
        flat.update(value if isinstance(value, Mapping) else {key: value})
    return flat


def _fits(value: Any, parameter: Tensor, copies: int | None) -> bool:
    if copies is None or not isinstance(value, Tensor):
        return value is not None
    if copies == 1 and value.ndim > 1 and value.shape != parameter.shape:
        return False
    # Also quantized: there is one code per element.
    return value.numel() == copies * parameter.numel()


def _described(state: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} {list(value.shape)}" if isinstance(value, Tensor) and value.ndim else str(key)
        for key, value in state.items()
    )
