"""How deep in the model each parameter lies, for learning rates that fall with the distance from the top.

Only the numbers in names and the order of registration are known, not the order of computation: where these do not
decide, an error asks for a ``layer_pattern``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lightning_optim.errors import InvalidParamGroups, listing
from lightning_optim.groups._parameters import NamedParameter, compiled

# A stack of at most this fraction of the largest one's size is a stem or a head of numbered modules.
_SMALL = 0.1

# Words in the names of parameters that a model adds or prepends to its input, such as ViT's cls_token and pos_embed.
_OF_THE_INPUT = frozenset({"token", "tokens", "embed", "embedding", "embeddings", "pos", "position", "positions"})


@dataclass(frozen=True)
class Depth:
    """Where a parameter lies.

    Attributes:
        layer: Its layer's number; 0 is the bottom of the deepest stack. Equal numbers are equally far from the top.
        from_top: Layers between it and the top, 0 for the top itself.
    """

    layer: int
    from_top: int


def layer_depths(parameters: Sequence[NamedParameter], pattern: str | None) -> dict[int, Depth]:
    """Returns the depth of each parameter by its id.

    Matches of the pattern with the same text before the number form a stack; several stacks, such as an encoder and a
    decoder, are each counted from their own top. Outside of the stacks:

    - Parameters registered before the blocks of the stack that is nearest in the module tree lie below them, later ones
      at the top.
    - For a parameter owned by a module that also contains the stack, its place in the computation is unknown. Those
      named as part of the input (``cls_token``, ``pos_embed``) lie at the bottom, all others at the top.

    Args:
        parameters: All trainable parameters, in the order of registration.
        pattern: Regular expression whose one group is a layer's number; ``None`` finds the blocks.

    Raises:
        InvalidParamGroups: If the pattern is malformed or matches nothing; if there is none and no blocks are found, or
            several stacks of them.
    """
    places = _matches(parameters, _found_pattern(parameters) if pattern is None else pattern)
    stacks: dict[str, list[int]] = {}
    for prefix, number in places.values():
        stacks.setdefault(prefix, []).append(number)
    lowest = {prefix: min(numbers) for prefix, numbers in stacks.items()}
    tops = {prefix: max(numbers) - lowest[prefix] + 2 for prefix, numbers in stacks.items()}
    deepest = max(tops.values())
    depths: dict[int, Depth] = {}
    begun: set[str] = set()
    for parameter in parameters:
        identity = id(parameter.parameter)
        if identity in places:
            prefix, number = places[identity]
            begun.add(prefix)
            from_top = tops[prefix] - (number - lowest[prefix] + 1)
        else:
            nearest = _nearest(parameter.name, stacks)
            below = _is_input(parameter.name) if _is_owned_above(parameter.name, stacks) else begun.isdisjoint(nearest)
            from_top = max(tops[prefix] for prefix in nearest) if below else 0
        depths[identity] = Depth(deepest - from_top, from_top)
    return depths


def _matches(parameters: Sequence[NamedParameter], pattern: str) -> dict[int, tuple[str, int]]:
    """Returns the text before the number, and the number, by the id of each parameter that the pattern matches."""
    expression = compiled(pattern, "layer_pattern")
    if expression.groups != 1:
        raise InvalidParamGroups(
            f"layer_pattern={pattern!r} must have exactly one group, the layer's number, such as "
            "r'encoder[.]layer[.](\\d+)[.]'",
            code="LO309",
        )
    places: dict[int, tuple[str, int]] = {}
    for parameter in parameters:
        found = next((match for name in parameter.names if (match := expression.search(name))), None)
        if found is None:
            continue
        if not (found.group(1) or "").isdigit():
            raise InvalidParamGroups(
                f"layer_pattern={pattern!r} finds {found.group(1)!r} in {parameter.name!r}: the group must match "
                "digits",
                code="LO309",
            )
        places[id(parameter.parameter)] = found.string[: found.start(1)], int(found.group(1))
    if not places:
        raise InvalidParamGroups(
            f"layer_pattern={pattern!r} matches no trainable parameter, such as {parameters[0].name!r}", code="LO309"
        )
    return places


def numbered_stacks(parameters: Iterable[NamedParameter]) -> list[str]:
    """Returns what is before the number in the names of the stacks of numbered blocks, the largest first.

    Stacks that are small beside it are a stem or a head, and left out.
    """
    sizes: dict[str, int] = {}
    numbers: dict[str, set[str]] = {}
    # Those whose members contain modules.
    composite: set[str] = set()
    for parameter in parameters:
        for match in re.finditer(r"(?:^|\.)(\d+)\.", parameter.name):
            prefix = parameter.name[: match.start(1)]
            sizes[prefix] = sizes.get(prefix, 0) + parameter.parameter.numel()
            numbers.setdefault(prefix, set()).add(match.group(1))
            if "." in parameter.name[match.end() :]:
                composite.add(prefix)
    several = [prefix for prefix, found in numbers.items() if len(found) > 1]
    # Numbered modules inside a block belong to the block.
    outermost = [p for p in several if not any(p != other and p.startswith(other) for other in several)]
    # Where there are blocks, a sequence of single layers is a stem or a head.
    stacks = [prefix for prefix in outermost if prefix in composite] or outermost
    stacks.sort(key=sizes.__getitem__, reverse=True)
    return [prefix for prefix in stacks if prefix == stacks[0] or sizes[prefix] > _SMALL * sizes[stacks[0]]]


def _found_pattern(parameters: Iterable[NamedParameter]) -> str:
    """Returns the pattern of the numbered blocks that hold most of the parameters."""
    stacks = numbered_stacks(parameters)
    if not stacks:
        raise InvalidParamGroups(
            "layer_decay needs numbered layers (an nn.ModuleList or nn.Sequential of blocks) and finds none; name them "
            "with layer_pattern, a regular expression with one group for the number, such as "
            "r'encoder[.]layer[.](\\d+)[.]'",
            code="LO310",
        )
    largest = stacks[0]
    if len(stacks) > 1:
        # Not re.escape, for patterns that are easy to read.
        either, one = (text.replace(".", "[.]") for text in ("|".join(stacks), largest))
        raise InvalidParamGroups(
            f"layer_decay finds several stacks of numbered layers, {listing(stacks)}, and cannot know whether one "
            f"follows the other. Write layer_pattern=r'^(?:{either})(\\d+)' to count each from its own top, or "
            f"r'^{one}(\\d+)' for that one alone",
            code="LO311",
        )
    return rf"^{re.escape(largest)}(\d+)\."


def _nearest(name: str, stacks: Iterable[str]) -> set[str]:
    """Returns the stacks with which a parameter shares the innermost module."""
    path = name.split(".")[:-1]
    shared = {prefix: _common(path, prefix.split(".")[:-1]) for prefix in stacks}
    return {prefix for prefix, length in shared.items() if length == max(shared.values())}


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _is_owned_above(name: str, stacks: Iterable[str]) -> bool:
    """Whether the module that owns a parameter also holds a stack."""
    owner = name.rpartition(".")[0]
    return any(not owner or prefix.startswith(f"{owner}.") for prefix in stacks)


def _is_input(name: str) -> bool:
    return not _OF_THE_INPUT.isdisjoint(name.rpartition(".")[2].split("_"))
