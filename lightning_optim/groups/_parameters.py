"""A model's parameters, each with its names and the modules that own it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_optim._compat.torch import NormWithStatistics
from lightning_optim.errors import InvalidParamGroups

_NORMS = (NormWithStatistics, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)

Target = nn.Module | Iterable[Any]


@dataclass(frozen=True)
class NamedParameter:
    """A parameter with all its names and the modules that own it.

    A tied parameter has several names and owners but appears once. ``is_output`` says that a module's
    ``get_output_embeddings()`` names its layer.
    """

    parameter: Tensor
    names: tuple[str, ...] = ()
    owners: tuple[nn.Module, ...] = ()
    is_output: bool = False

    @property
    def name(self) -> str:
        """The first of its names, or its shape if it has none."""
        return self.names[0] if self.names else f"<unnamed {tuple(self.parameter.shape)}>"

    @property
    def modules(self) -> tuple[tuple[str, nn.Module | None], ...]:
        """Names of the modules it belongs to, with the modules, which are ``None`` if only names were given."""
        prefixes = [name.rpartition(".")[0] for name in self.names or ("",)]
        return tuple(zip(prefixes, self.owners or (None,) * len(prefixes), strict=True))

    @property
    def is_matrix(self) -> bool:
        """Whether it has at least two dimensions and is not a bias."""
        # Biases may have more than one dimension: those of experts are stacked, attention's bias_k is (1, 1, width).
        return self.parameter.ndim >= 2 and not self.is_bias

    @property
    def is_bias(self) -> bool:
        """Whether it is called a bias."""
        return any("bias" in name.rpartition(".")[2].split("_") for name in self.names)

    @property
    def decays(self) -> bool:
        """Whether weight decay makes sense: not a bias, not in a norm layer, at least two dimensions."""
        return self.is_matrix and not any(map(_is_norm, self.owners))

    @property
    def is_embedding(self) -> bool:
        """Whether an embedding owns it."""
        return any(isinstance(owner, _EMBEDDINGS) for owner in self.owners)


def device_types(parameters: Iterable[NamedParameter]) -> set[str]:
    """Returns the types of device that the parameters are on, such as ``"cuda"``."""
    return {parameter.parameter.device.type for parameter in parameters}


def named_parameters(target: Target) -> list[NamedParameter]:
    """Collects the trainable parameters of a module, or of an iterable of parameters or of (name, parameter) pairs.

    Raises:
        InvalidParamGroups: If nothing is trainable, a parameter is not yet initialized, or ``target`` is none of these.
    """
    return trainable(every_parameter(target))


def trainable(parameters: Iterable[NamedParameter]) -> list[NamedParameter]:
    """Returns those that are not frozen.

    Raises:
        InvalidParamGroups: If all are.
    """
    found = [parameter for parameter in parameters if parameter.parameter.requires_grad]
    if not found:
        raise InvalidParamGroups(
            "no parameter to optimize: all are frozen (requires_grad=False) or there are none. If configure_model() or "
            "setup() creates the layers, build the optimizer after it.",
            code="LO306",
        )
    return found


def every_parameter(target: Target) -> list[NamedParameter]:
    """Collects the parameters, also frozen ones, in the order of registration; see :func:`named_parameters`.

    Raises:
        InvalidParamGroups: If a parameter is not yet initialized, or ``target`` cannot be read.
    """
    found: dict[int, NamedParameter] = {}
    outputs = _outputs(target)
    for name, parameter, owner in _walk(target):
        if is_lazy(parameter):
            raise InvalidParamGroups(
                f"{name!r} is not initialized yet (a Lazy module); run one batch through the model before the "
                "optimizer is built, for instance in setup()",
                code="LO307",
            )
        known = found.get(id(parameter), NamedParameter(parameter))
        found[id(parameter)] = NamedParameter(
            parameter,
            known.names + ((name,) if name else ()),
            known.owners + ((owner,) if owner else ()),
            owner in outputs or known.is_output,
        )
    return list(found.values())


def compiled(pattern: Any, where: str) -> re.Pattern[str]:
    """Compiles a regular expression over parameter names, given as the argument ``where``.

    Raises:
        InvalidParamGroups: If it is malformed.
    """
    if not isinstance(pattern, str):
        raise InvalidParamGroups(
            f"{where}: {pattern!r} ({type(pattern).__name__}) is not a regular expression", code="LO303"
        )
    try:
        return re.compile(pattern)
    except re.error as error:
        hint = f"; did you mean the glob's equivalent {pattern.replace('.', '[.]').replace('*', '.*')!r}?"
        raise InvalidParamGroups(
            f"{where}: {pattern!r} is not a regular expression ({error}){hint if '*' in pattern else ''}", code="LO303"
        ) from None


def _walk(target: Target) -> Iterator[tuple[str, Tensor, nn.Module | None]]:
    """Yields (name, parameter, owner), tied parameters once per name."""
    if isinstance(target, nn.Module):
        for prefix, module in target.named_modules(remove_duplicate=False):
            # Even if the module overrides named_parameters.
            own = nn.Module.named_parameters(module, recurse=False, remove_duplicate=False)
            for name, parameter in own:
                yield f"{prefix}.{name}" if prefix else name, parameter, module
        return
    if isinstance(target, (Tensor, str, Mapping)) or not isinstance(target, Iterable):
        raise InvalidParamGroups(
            "expected a module, parameters or (name, parameter) pairs such as model.named_parameters(), "
            f"got {type(target).__name__}",
            code="LO308",
        )
    for item in target:
        name, parameter = item if isinstance(item, tuple) and len(item) == 2 else ("", item)
        if not isinstance(parameter, Tensor):
            hint = " (for groups of your own use param_groups={pattern: {...}})" if isinstance(item, dict) else ""
            raise InvalidParamGroups(
                f"expected parameters or (name, parameter) pairs, got an item of type {type(item).__name__}{hint}",
                code="LO308",
            )
        yield name, parameter, None


def _outputs(target: Target) -> set[nn.Module]:
    """Returns the modules that ``get_output_embeddings()``, as Hugging Face's models have it, names."""
    modules = target.modules() if isinstance(target, nn.Module) else ()
    asked = (getattr(module, "get_output_embeddings", None) for module in modules)
    return {found for found in (ask() for ask in asked if callable(ask)) if isinstance(found, nn.Module)}


def _is_norm(module: nn.Module) -> bool:
    # Many models define norm layers (LlamaRMSNorm, LayerNorm2d, T5LayerNorm), recognized by name.
    return isinstance(module, _NORMS) or re.search(r"Norm(\d+d)?$", type(module).__name__) is not None
