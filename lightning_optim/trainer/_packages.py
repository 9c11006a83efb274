"""Lightning's two packages, and what we register with them.

``lightning.pytorch`` and ``pytorch_lightning`` are the same code with separate classes and registries. Only this module
knows both: everywhere else code names the classes of ``lightning.pytorch``, and asks here for those of a given Trainer
or module. ``pytorch_lightning`` is never imported from here.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, TypeVar

from lightning.pytorch import LightningModule
from lightning_utilities.core.overrides import is_overridden as _is_overridden
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_optim.errors import IncompatibleTrainer

OTHER = "pytorch_lightning"

_TWINS = {"lightning.pytorch": OTHER, "lightning.fabric": "lightning_fabric"}
#: The top-level packages of Lightning's classes.
LIGHTNING = frozenset({"lightning", *_TWINS.values()})
# The module from which our classes derived from the other package's can be imported, and so unpickled.
DERIVED_IN = "lightning_optim.pytorch_lightning"
_derived: dict[type, type] = {}

_T = TypeVar("_T")


def top(cls: type) -> str:
    """Returns the top-level package that defines a class."""
    return cls.__module__.partition(".")[0]


def is_others(value: object) -> bool:
    """Whether a Trainer, module, plugin ... or class is based on ``pytorch_lightning``'s classes."""
    owner = value if isinstance(value, type) else type(value)
    return any(top(base) in _TWINS.values() for base in owner.__mro__)


def twin(ours: Any) -> Any:
    """Returns a ``lightning.pytorch`` class's twin in ``pytorch_lightning``; ``None`` if that is not imported."""
    package = ".".join(ours.__module__.split(".")[:2])
    module = sys.modules.get(_TWINS[package] + ours.__module__.removeprefix(package))
    return getattr(module, ours.__qualname__, None)


def kin(*classes: type[_T]) -> tuple[type[_T], ...]:
    """Returns classes of ``lightning.pytorch`` and their twins in ``pytorch_lightning``, for ``isinstance``."""
    return (*classes, *filter(None, map(twin, classes)))


def of(owner: object, ours: type[_T]) -> type[_T]:
    """Returns a class of ``lightning.pytorch``, or one of ours, as the package of ``owner`` has it."""
    if not is_others(owner):
        return ours
    found: type[_T] = twin(ours) if _is_lightnings(ours) else derived(ours)
    return found


def set_inherited(cls: type, owner: object, name: str, value: Any) -> None:
    """Sets a property of ``owner`` that ``cls`` overrides, as the bases of ``cls`` do."""
    getattr(super(cls, type(owner)), name).__set__(owner, value)


def is_overridden(method: str, module: object) -> bool:
    """Whether a module, of either package, overrides a method of LightningModule."""
    return _is_overridden(method, module, of(module, LightningModule))


def derived(ours: type[_T]) -> type[_T]:
    """Returns a copy of one of our classes, with the same mixins before ``pytorch_lightning``'s base class.

    The body of such a class must not contain methods: they would still belong to ``lightning.pytorch``'s. Raises
    LookupError if this version of ``pytorch_lightning`` has no such base class.
    """
    if ours not in _derived:
        bases = tuple(twin(base) if _is_lightnings(base) else base for base in ours.__bases__)
        if None in bases:
            raise LookupError(f"this version of {OTHER} has not all of {[base.__name__ for base in ours.__bases__]}")
        body = {name: value for name, value in vars(ours).items() if isinstance(value, str)}
        metaclass: Any = type(ours)
        _derived[ours] = metaclass(ours.__name__, bases, {**body, "__module__": DERIVED_IN})
    return _derived[ours]


def _is_lightnings(ours: type) -> bool:
    return ours.__module__.startswith(tuple(f"{package}." for package in _TWINS))


class _Watch(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Runs a function when ``pytorch_lightning`` has been imported, then removes itself."""

    def __init__(self, then: Callable[[], None]) -> None:
        self._then = then
        self._loader: Any = None
        self._asks = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        # Other finders may do the same and call back.
        if fullname != OTHER or self._asks:
            return None
        self._asks = True
        try:
            found = (finder.find_spec(fullname, path, target) for finder in list(sys.meta_path))
            spec = next(filter(None, found), None)
        finally:
            self._asks = False
        if spec is not None and spec.loader is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self._loader.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        self._then()


def when_imported(then: Callable[[], None]) -> None:
    """Calls ``then`` now if ``pytorch_lightning`` is already imported, else as soon as it is."""
    if OTHER in sys.modules:
        then()
    else:
        sys.meta_path.insert(0, _Watch(then))


def refused(argument: str, flag: str, ours: type) -> type:
    """Returns a class to register with ``pytorch_lightning`` for a flag that only works with ``lightning.pytorch``."""

    def refuse(cls: type, *args: Any, **kwargs: Any) -> Any:
        raise IncompatibleTrainer(
            f"Trainer({argument}={flag!r}) is for lightning.pytorch, and this Trainer is pytorch_lightning's. Write "
            "`import lightning as L` and use L.Trainer and L.LightningModule.",
            code="LO423",
        )

    # Lightning lists the accelerators that are available.
    body = {"__module__": DERIVED_IN, "__new__": refuse, "is_available": staticmethod(lambda: False)}
    return type(ours.__name__, (), body)


def enter(registry: Any, argument: str, flag: str, ours: type, **arguments: Any) -> None:
    """Registers a class under a flag of ``Trainer(argument=...)``; one that another class has stays, with a warning."""
    # Compared by path: importing a module a second time creates its classes anew.
    theirs, own = _path(registry[flag][argument] if flag in registry else ours), _path(ours)
    if theirs == own:
        description = (ours.__doc__ or "").partition("\n")[0]
        registry.register(flag, ours, description, override=True, **arguments)
        return
    rank_zero_warn(
        f"{argument}={flag!r} stays {theirs}, which had that name before lightning_optim was imported; {own} is "
        f"not registered. To have ours, use Trainer({argument}=lightning_optim.{ours.__qualname__}())."
    )


def _path(registered: Any) -> str:
    return f"{registered.__module__}.{registered.__qualname__}" if isinstance(registered, type) else repr(registered)
