"""Short names for the classes of the big collections: ``timm:lamb``, ``pytorch_optimizer:soap``, ``heavyball:SOAP``."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch.optim import Optimizer

from lightning_optim.errors import UnknownOptimizer, close_names, listing, said
from lightning_optim.table import _availability as availability

# A name, its class, and what the name changes in the constructor's defaults.
_Named = tuple[str, type[Optimizer], Mapping[str, Any]]


@dataclass(frozen=True)
class Member:
    """A class of a collection under one of its names.

    Attributes:
        name: The short name, as the collection spells it.
        kind: The class.
        defaults: What the name changes in the constructor's defaults: ``timm:lambc`` is Lamb with
            ``trust_clip=True``.
        path: The shortest dotted path that leads to the class.
    """

    name: str
    kind: type[Optimizer]
    defaults: Mapping[str, Any]
    path: str


@dataclass(frozen=True)
class Collection:
    """A package of many optimizers.

    Attributes:
        name: What a short name begins with, and what ``import`` takes.
        distribution: Name on PyPI.
        module: Where the classes are.
        names: Yields the names that the collection's own functions give to classes.
    """

    name: str
    distribution: str
    module: str
    names: Callable[[Any], Iterator[_Named]]

    def members(self, asked: str) -> Mapping[str, Member]:
        """Imports the collection and returns its classes by their short names in lower case.

        Args:
            asked: What was asked for, for the text of an error.

        Raises:
            MissingDependency: If it is not installed, or cannot be imported.
        """
        install = f"pip install --upgrade {self.distribution}"
        if sys.modules.get(self.name) is None and importlib.util.find_spec(self.name) is None:
            reason = f"the package {self.distribution!r} is not installed: {install}"
            raise availability.missing(asked, (reason,))
        try:
            return _members(self, importlib.import_module(self.module))
        except Exception as error:  # another version of torch or of what it needs fails in many ways
            lacks = error.name.partition(".")[0] if isinstance(error, ModuleNotFoundError) and error.name else self.name
            helps = install if lacks == self.name else f"pip install {lacks}"
            reason = f"{self.distribution!r} is installed, but {self.module} fails ({said(error)}): {helps}"
            raise availability.missing(asked, (reason,)) from error

    def member(self, asked: str) -> Member:
        """Returns the class that a short name means; its case does not matter.

        Raises:
            UnknownOptimizer: If there is none, with the names that come close.
            MissingDependency: If the collection cannot be imported.
        """
        members = self.members(asked)
        typed = asked.partition(":")[2]
        if typed.lower() in members:
            return members[typed.lower()]
        near = [members[name].name for name in close_names(typed, members)]
        hint = f" Close names: {listing(near)}." if near else ""
        raise UnknownOptimizer(
            f"optim={asked!r}: {self.name} has no optimizer {typed!r}.{hint} "
            f"`lightning-optim list '{self.name}:*'` shows all.",
            code="LO101",
        )


@functools.cache
def _members(collection: Collection, module: ModuleType) -> Mapping[str, Member]:
    found: dict[str, Member] = {}
    for name, kind, defaults in (*collection.names(module), *_exported(module)):
        short = f"{collection.name}:{name}"
        found.setdefault(name.lower(), Member(short, kind, defaults, _path(module, kind)))
    return dict(sorted(found.items()))


def _exported(module: ModuleType) -> Iterator[_Named]:
    """Yields the package's own classes, some of which its functions do not name."""
    package = module.__name__.partition(".")[0]
    for name in getattr(module, "__all__", vars(module)):
        kind = getattr(module, name, None)
        if name.startswith("_") or not (isinstance(kind, type) and issubclass(kind, Optimizer)):
            continue
        if kind.__module__.partition(".")[0] == package:
            yield name, kind, {}


def _path(module: ModuleType, kind: type[Optimizer]) -> str:
    public = "torch.optim" if kind.__module__.startswith("torch.optim.") else module.__name__
    for place in (public, kind.__module__):
        if getattr(sys.modules[place], kind.__name__, None) is kind:
            return f"{place}.{kind.__name__}"
    return f"{kind.__module__}.{kind.__qualname__}"


def _of_timm(module: Any) -> Iterator[_Named]:
    for name in module.list_optimizers():
        info = module.get_optimizer_info(name)
        # Those of apex and bitsandbytes are paths, for CUDA only.
        if isinstance(info.opt_class, type):
            # As timm's own factory does.
            momentum: dict[str, Any] = {"momentum": 0.9} if info.has_momentum else {}
            yield name, info.opt_class, momentum | dict(info.defaults or {})


def _of_pytorch_optimizer(module: Any) -> Iterator[_Named]:
    for name in module.get_supported_optimizers():
        yield name, module.load_optimizer(name), {}


def _of_heavyball(module: Any) -> Iterator[_Named]:
    yield from ()


COLLECTIONS = {
    collection.name: collection
    for collection in (
        Collection("timm", "timm", "timm.optim", _of_timm),
        Collection("pytorch_optimizer", "pytorch-optimizer", "pytorch_optimizer", _of_pytorch_optimizer),
        Collection("heavyball", "heavyball", "heavyball", _of_heavyball),
    )
}


def collection_of(name: str) -> Collection | None:
    """Returns the collection that a short name, or a pattern of short names, begins with."""
    prefix, colon, _ = name.partition(":")
    return COLLECTIONS.get(prefix) if colon else None
