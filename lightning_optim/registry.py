"""From a name to its row: the built-in table, plugins, ``register()`` and dotted paths."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import make_dataclass
from typing import Any

from torch.optim import LBFGS, Optimizer

from lightning_optim.catalog import ROWS
from lightning_optim.catalog.layerwise import SUFFIX, layerwise_row
from lightning_optim.errors import DuplicateOptimizer, MissingDependency, UnknownOptimizer, close_names, listing
from lightning_optim.options import Options, option, required
from lightning_optim.spec import OptimizerSpec

ENTRY_POINT_GROUP = "lightning_optim.optimizers"

_COUPLED = "LBFGS evaluates the model several times for one step over all parameters"

# Arguments of a class given by dotted path that are not options: they have a parameter of their own.
_NOT_OPTIONS = ("lr", "weight_decay")


class Registry(Mapping[str, OptimizerSpec]):
    """The identifiers and their rows; aliases count as identifiers.

    Every identifier also has a ``_layerwise`` form, whose row is derived when it is asked for. Iteration gives the
    identifiers without it.

    Plugins are looked up in the entry-point group ``lightning_optim.optimizers`` on first use; each entry point is an
    :class:`OptimizerSpec` or an iterable of them.
    """

    def __init__(self, rows: Iterable[OptimizerSpec]) -> None:
        self._specs: dict[str, OptimizerSpec] = {}
        self._plugins_loaded = False
        self._plugins: list[importlib.metadata.EntryPoint] = []
        for row in rows:
            self.register(row)

    def register(self, spec: OptimizerSpec) -> None:
        """Adds a row under its name and its aliases.

        Raises:
            DuplicateOptimizer: If one of these names is taken.
        """
        names = (spec.name, *spec.aliases)
        for name in names:
            if name in self._specs:
                raise DuplicateOptimizer(
                    f"{name!r} is already registered ({self._specs[name].implementation}); choose another name"
                )
        self._specs.update(dict.fromkeys(names, spec))

    def __getitem__(self, name: str) -> OptimizerSpec:
        """Returns the row of ``name``.

        Raises:
            UnknownOptimizer: If nothing has that name, with the names that come close.
            MissingDependency: If ``name`` is a dotted path into a package that is not installed.
            IncompatibleTrainer: If ``name`` ends in ``_layerwise`` and the optimizer cannot be stepped so.
        """
        if not isinstance(name, str):
            raise UnknownOptimizer(
                f"an optimizer is named by a string such as 'adamw_torch', got {name!r} ({type(name).__name__})"
            )
        # Plugins after the table's own rows: one that is broken must not stop who does not use it.
        if name not in self._specs:
            self._load_plugins()
        if name in self._specs:
            return self._specs[name]
        base = name.removesuffix(SUFFIX)
        suffix = name[len(base) :]
        if suffix and not base.endswith(SUFFIX) and (base in self._specs or "." in base):
            return layerwise_row(self[base])
        if "." in name:
            # A class of ours that projects has to be told what: its row does that.
            rows = (spec for spec in self._specs.values() if spec.projects)
            return next((spec for spec in rows if spec.implementation == name), None) or spec_from_path(name)
        near = [other + suffix for other in close_names(base, self._specs)]
        hint = (
            f"Close names: {listing(near)}." if near else f"Names: {listing(other + suffix for other in self._specs)}."
        )
        raise UnknownOptimizer(
            f"there is no optimizer {name!r} in this version of lightning_optim. {hint} "
            "`lightning-optim list` shows all; a dotted path such as 'torch.optim.NAdam' names any other class."
        )

    def get(self, name: str, default: Any = None) -> Any:
        """Returns the row of a name of the table, or ``default``; dotted paths are not tried."""
        return self[name] if name in self else default  # noqa: SIM401

    def __contains__(self, name: object) -> bool:
        self._load_plugins()
        return isinstance(name, str) and name.removesuffix(SUFFIX) in self._specs

    def __iter__(self) -> Iterator[str]:
        self._load_plugins()
        return iter(self._specs)

    def __len__(self) -> int:
        self._load_plugins()
        return len(self._specs)

    def _load_plugins(self) -> None:
        if self._plugins_loaded:
            return
        self._plugins_loaded = True
        for entry_point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
            if entry_point in self._plugins:
                continue
            try:
                loaded = entry_point.load()
                for spec in (loaded,) if isinstance(loaded, OptimizerSpec) else tuple(loaded):
                    self.register(spec)
                self._plugins.append(entry_point)
            except Exception as error:
                self._plugins_loaded = False
                raise RuntimeError(
                    f"the plugin {entry_point.value!r} (entry point {entry_point.name!r} of {ENTRY_POINT_GROUP!r}) "
                    f"cannot be loaded: {error}. Fix it or uninstall its package."
                ) from error


def spec_from_path(path: str) -> OptimizerSpec:
    """Makes a row for any optimizer class of any installed package, its options read from the signature.

    Raises:
        MissingDependency: If the package is not installed.
        UnknownOptimizer: If the path does not lead to a subclass of ``torch.optim.Optimizer`` whose constructor takes
            the parameters first and ``lr`` and all others by name.
    """
    module_name, _, class_name = path.rpartition(".")
    package = module_name.partition(".")[0]
    # A module that runs as a script has no spec to find, but is imported.
    if not package or (sys.modules.get(package) is None and importlib.util.find_spec(package) is None):
        raise MissingDependency(
            f"optim={path!r}: no package {package!r} is installed. Install the package that provides it, or use a name "
            "that `lightning-optim list` shows."
        )
    try:
        module = importlib.import_module(module_name)
        loaded = getattr(module, class_name)
    except (ImportError, AttributeError) as error:
        raise UnknownOptimizer(f"optim={path!r} cannot be imported: {error}") from error
    if not (isinstance(loaded, type) and issubclass(loaded, Optimizer)):
        raise UnknownOptimizer(f"optim={path!r} is no subclass of torch.optim.Optimizer but {loaded!r}")
    if callable(getattr(loaded, "train", None)) and callable(getattr(loaded, "eval", None)):
        raise UnknownOptimizer(
            f"optim={path!r} has to be switched between training and evaluation, which a dotted path cannot do; use "
            "optim='schedule_free_adamw', 'schedule_free_radam' or 'schedule_free_sgd'"
        )
    parameters = inspect.signature(loaded).parameters
    _check_signature(path, parameters)
    defaults = {name: _default(parameters, name) for name in ("lr", "weight_decay")}
    return OptimizerSpec(
        name=path,
        target=f"{module_name}:{class_name}",
        summary=f"{class_name} of {package}, by dotted path",
        source=path,
        options=_options_from_signature(class_name, parameters),
        default_lr=defaults["lr"],
        default_weight_decay=defaults["weight_decay"] or 0.0,
        decays="weight_decay" in parameters,
        state=None,
        coupled=_COUPLED if issubclass(loaded, LBFGS) else "",
        # Nothing is known about these; torch's own checks at the first step are all there is.
        sparse=True,
        complex=True,
        sharded=True,
        half_weights=True,
    )


def _check_signature(path: str, parameters: Mapping[str, inspect.Parameter]) -> None:
    by_position = [name for name, parameter in parameters.items() if parameter.kind is parameter.POSITIONAL_ONLY][1:]
    if by_position:
        raise UnknownOptimizer(
            f"optim={path!r} takes {listing(by_position)} by position only; an optimizer's arguments are passed by name"
        )
    if "lr" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise UnknownOptimizer(f"optim={path!r} has a constructor without the argument 'lr': {list(parameters)}")


def _default(parameters: Mapping[str, inspect.Parameter], name: str) -> Any:
    default = parameters[name].default if name in parameters else None
    return default if isinstance(default, (int, float)) else None


def _options_from_signature(class_name: str, parameters: Mapping[str, inspect.Parameter]) -> type[Options]:
    fields: list[Any] = []
    # The first argument is the parameters, whatever its name.
    for name, parameter in list(parameters.items())[1:]:
        if name in _NOT_OPTIONS or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if isinstance(parameter.default, dict) or hasattr(Options, name):
            raise UnknownOptimizer(
                f"the argument {name!r} of {class_name} cannot be an option of a dotted path; describe the optimizer "
                "with a row and lightning_optim.register()"
            )
        help = f"argument of {class_name}"
        if parameter.default is parameter.empty:
            fields.insert(0, (name, Any, required(help, scope="constructor")))
        else:
            # A dataclass takes no mutable defaults, and betas=[0.9, 0.99] means a tuple.
            default = tuple(parameter.default) if isinstance(parameter.default, (list, set)) else parameter.default
            fields.append((name, _type_of(default), option(default, help, scope="constructor")))
    return make_dataclass(f"{class_name}Options", fields, bases=(Options,), frozen=True)


def _type_of(default: Any) -> Any:
    if isinstance(default, (bool, float, str)):
        return type(default)
    # A default such as momentum=0 says only that a number is meant.
    return int | float if isinstance(default, int) else Any


REGISTRY = Registry(ROWS)


def register(spec: OptimizerSpec) -> None:
    """Adds an optimizer to the table of this process; see :meth:`Registry.register`."""
    REGISTRY.register(spec)
