"""From a name to its row: the built-in table, plugins, ``register()`` and dotted paths."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import inspect
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import make_dataclass
from types import MappingProxyType
from typing import Any

from torch.optim import Optimizer

from lightning_optim.errors import DuplicateOptimizer, MissingDependency, UnknownOptimizer, close_names, listing, said
from lightning_optim.table._collections import COLLECTIONS, collection_of
from lightning_optim.table._known import constructed, known_fields, refuse_unfit
from lightning_optim.table._layerwise import SUFFIX, layerwise_row
from lightning_optim.table._misnomers import refuse_arguments
from lightning_optim.table._options import Options, describe, option, required
from lightning_optim.table._spec import OptimizerSpec
from lightning_optim.table.rows import ROWS

ENTRY_POINT_GROUP = "lightning_optim.optimizers"

# Arguments of a dotted path's class that are not options: they are separate arguments.
_NOT_OPTIONS = ("lr", "weight_decay")


class Registry(Mapping[str, OptimizerSpec]):
    """The identifiers and their rows, as a read-only mapping.

    Aliases are identifiers, too, and so are the ``_layerwise`` forms, whose rows are derived on demand; :attr:`plain`
    is the mapping without those. A dotted path is not an identifier, nor is a short name of a class in a collection:
    :meth:`find` makes their rows.

    Plugins are looked up in the entry-point group ``lightning_optim.optimizers`` on first use; each entry point is an
    :class:`OptimizerSpec` or an iterable of them.
    """

    def __init__(self, rows: Iterable[OptimizerSpec]) -> None:
        self._specs: dict[str, OptimizerSpec] = {}
        self._plugins_loaded = False
        self._plugins: list[importlib.metadata.EntryPoint] = []
        for row in rows:
            self.register(row)

    @property
    def plain(self) -> Mapping[str, OptimizerSpec]:
        """The identifiers and their rows without the derived ``_layerwise`` forms."""
        self._load_plugins()
        return MappingProxyType(self._specs)

    def register(self, spec: OptimizerSpec) -> None:
        """Adds a row under its name and aliases, with its ``_layerwise`` form.

        Raises:
            DuplicateOptimizer: If one of these names is taken, or ends in ``_layerwise``.
        """
        names = (spec.name, *spec.aliases)
        for name in names:
            if name.endswith(SUFFIX):
                raise DuplicateOptimizer(
                    f"{name!r} is the name of a derived row. Register {name.removesuffix(SUFFIX)!r}, and {name!r} "
                    "steps it during backward; for another algorithm choose a name without this ending",
                    code="LO109",
                )
            if name in self._specs:
                raise DuplicateOptimizer(
                    f"{name!r} is already registered ({self._specs[name].implementation}); choose another name",
                    code="LO109",
                )
        self._specs.update(dict.fromkeys(names, spec))

    @contextmanager
    def knowing(self, spec: OptimizerSpec) -> Iterator[None]:
        """Has a row registered inside, unless it is already.

        Raises:
            DuplicateOptimizer: If another row has one of its names.
        """
        if self.plain.get(spec.name) is spec:
            yield
            return
        self.register(spec)
        try:
            yield
        finally:
            for name in (spec.name, *spec.aliases):
                del self._specs[name]

    def __getitem__(self, name: str) -> OptimizerSpec:
        """Returns the row of the identifier ``name``.

        Raises:
            UnknownOptimizer: If it is not an identifier; also a ``KeyError``.
        """
        if not isinstance(name, str):
            raise UnknownOptimizer(
                f"an optimizer is named by a string such as 'adamw_torch', got {name!r} ({type(name).__name__})",
                code="LO102",
            )
        # Plugins after the built-in rows: a broken one must not affect those who do not use it.
        base = _base(name)
        if base not in self._specs:
            self._load_plugins()
        if base not in self._specs:
            raise UnknownOptimizer(self._unknown(name), code="LO101")
        if base == name:
            return self._specs[base]
        if self._specs[base].coupled:
            raise UnknownOptimizer(
                f"there is no optimizer {name!r}: {self._specs[base].coupled}. Use {base!r}.", code="LO610"
            )
        return layerwise_row(self._specs[base])

    def find(self, name: str) -> OptimizerSpec:
        """Returns the row of an identifier, or one made for a class.

        A class is named by a dotted path such as ``"torch.optim.NAdam"``, or by a short name such as ``"timm:lamb"``.

        Raises:
            UnknownOptimizer: If nothing has that name, with the names that come close.
            MissingDependency: If ``name`` is of a class in a package that is not installed.
            IncompatibleTrainer: If ``name`` ends in ``_layerwise`` and the optimizer cannot be stepped so.
        """
        base = _base(name) if isinstance(name, str) else name
        if base != name and (base in self or "." in base or collection_of(base)):
            return layerwise_row(self.find(base))
        if isinstance(name, str) and collection_of(name) and name not in self:
            return self._completed(_spec_from_short_name(name))
        if isinstance(name, str) and "." in name and name not in self:
            # Our projecting classes need to know what to project: their rows see to that.
            projecting = (spec for spec in self._specs.values() if spec.projects and spec.implementation == name)
            return next(projecting, None) or self._completed(spec_from_path(name))
        return self[name]

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        base = _base(name)
        if base not in self._specs:
            self._load_plugins()
        return base in self._specs and (base == name or not self._specs[base].coupled)

    def __iter__(self) -> Iterator[str]:
        yield from self.plain
        yield from (name + SUFFIX for name, spec in self.plain.items() if not spec.coupled)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _unknown(self, name: str) -> str:
        if collection_of(name):
            return f"{name!r} is the short name of a class, not an identifier. REGISTRY.find({name!r}) makes its row."
        if ":" in name:
            known = listing(f"{collection}:" for collection in COLLECTIONS)
            return f"{name!r} is no short name of a class in a collection: they begin with {known}."
        if "." in name:
            return f"{name!r} is a dotted path, not an identifier. REGISTRY.find({name!r}) makes its row."
        base = name.removesuffix(SUFFIX)
        suffix = name[len(base) :]
        others = [other for other, spec in self._specs.items() if not (suffix and spec.coupled)]
        near = [other + suffix for other in close_names(base, others)]
        hint = f"Close names: {listing(near)}." if near else f"Names: {listing(other + suffix for other in others)}."
        return (
            f"there is no optimizer {name!r} in this version of lightning_optim. {hint} "
            "`lightning-optim list` shows all; a dotted path such as 'torch.optim.NAdam' names any other class."
        )

    def known_as(self, name: str) -> str:
        """Returns the identifier of the class with the dotted path ``name``, or ``name`` if there is none."""
        return next((row.name for row in self._specs.values() if row.target.replace(":", ".") == name), name)

    def _completed(self, spec: OptimizerSpec) -> OptimizerSpec:
        """Returns a row made for a class, with the state format of the row that builds the same class."""
        path = spec.implementation
        known = self.known_as(path)
        if known != path:
            spec = dataclasses.replace(spec, state_format=self._specs[known].state_format)
        class_name = path.rpartition(".")[2]
        same = (row for row in self._specs.values() if row.implementation.rpartition(".")[2] == class_name)
        kin = tuple(dict.fromkeys(row.name for row in same if not row.choices))
        note = f"optim={kin[0]!r} is this algorithm with typed options and a state whose bytes are known" if kin else ""
        return dataclasses.replace(spec, kin=kin, note=note)

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
                    f"cannot be loaded: {said(error)}. Fix it or uninstall its package."
                ) from error


def _base(name: str) -> str:
    """Returns the name without the ``_layerwise`` suffix; a doubled suffix is not removed."""
    base = name.removesuffix(SUFFIX)
    return name if base.endswith(SUFFIX) else base


def spec_from_path(path: str) -> OptimizerSpec:
    """Makes a row for any optimizer class of any installed package, with options from its signature.

    Raises:
        MissingDependency: If the package is not installed.
        UnknownOptimizer: If the path does not lead to a subclass of ``torch.optim.Optimizer`` whose constructor takes
            the parameters first and ``lr`` and all others by name.
    """
    module_name, _, class_name = path.rpartition(".")
    package = module_name.partition(".")[0]
    # A module running as a script has no spec, but is imported.
    if not package or (sys.modules.get(package) is None and importlib.util.find_spec(package) is None):
        raise MissingDependency(
            f"optim={path!r}: no package {package!r} is installed. Install the package that provides it, or use a name "
            "that `lightning-optim list` shows.",
            code="LO107",
        )
    try:
        module = importlib.import_module(module_name)
        loaded = getattr(module, class_name)
    except (ImportError, AttributeError) as error:
        raise UnknownOptimizer(f"optim={path!r} cannot be imported: {said(error)}", code="LO103") from error
    if not (isinstance(loaded, type) and issubclass(loaded, Optimizer)):
        raise UnknownOptimizer(f"optim={path!r} is no subclass of torch.optim.Optimizer but {loaded!r}", code="LO103")
    return _spec_from_class(path, loaded, path, f"{class_name} of {package}, by dotted path")


def _spec_from_short_name(name: str) -> OptimizerSpec:
    """Makes a row for a class of a collection."""
    collection = collection_of(name)
    assert collection is not None
    member = collection.member(name)
    summary = f"{member.kind.__name__} of {member.kind.__module__.partition('.')[0]}"
    return _spec_from_class(member.name, member.kind, member.path, summary, member.defaults)


def _spec_from_class(
    name: str, loaded: type[Optimizer], path: str, summary: str, changed: Mapping[str, Any] = MappingProxyType({})
) -> OptimizerSpec:
    """Makes a row for a class.

    Args:
        name: The row's name.
        loaded: The class.
        path: Where it is found.
        summary: One line.
        changed: What is another default than the constructor's.

    Raises:
        UnknownOptimizer: If its constructor does not take the parameters first, and ``lr`` and all others by name.
    """
    module_name, _, class_name = path.rpartition(".")
    refuse_unfit(name, loaded, ROWS)
    parameters = {
        key: parameter.replace(default=changed.get(key, parameter.default))
        for key, parameter in inspect.signature(constructed(loaded)).parameters.items()
    }
    _check_signature(name, parameters)
    defaults = {key: _default(parameters, key) for key in ("lr", "weight_decay")}
    known = known_fields(loaded, path, parameters)
    left_out = (*_NOT_OPTIONS, "warmup_steps") if known.get("warmup") == "optimizer" else _NOT_OPTIONS
    spec = OptimizerSpec(
        name=name,
        target=f"{module_name}:{class_name}",
        summary=summary,
        source=path,
        options=_options_from_signature(class_name, parameters, left_out),
        default_lr=defaults["lr"],
        default_weight_decay=defaults["weight_decay"] or 0.0,
        decays="weight_decay" in parameters,
        state=None,
        # Unknown for such classes: only torch's checks in the first step apply.
        sparse=True,
        complex=True,
        sharded=True,
        half_weights=True,
    )
    return dataclasses.replace(spec, **known)


def _check_signature(name: str, parameters: Mapping[str, inspect.Parameter]) -> None:
    by_position = [key for key, parameter in parameters.items() if parameter.kind is parameter.POSITIONAL_ONLY][1:]
    if by_position:
        raise UnknownOptimizer(
            f"optim={name!r} takes {listing(by_position)} by position only; an optimizer's arguments are passed by "
            "name",
            code="LO104",
        )
    if "lr" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise UnknownOptimizer(
            f"optim={name!r} has a constructor without the argument 'lr': {list(parameters)}", code="LO104"
        )


def _default(parameters: Mapping[str, inspect.Parameter], name: str) -> Any:
    default = parameters[name].default if name in parameters else None
    return default if isinstance(default, (int, float)) else None


def _options_from_signature(
    class_name: str, parameters: Mapping[str, inspect.Parameter], left_out: Collection[str]
) -> type[Options]:
    fields: list[Any] = []
    # The first argument is the parameters, whatever its name.
    for name, parameter in list(parameters.items())[1:]:
        if name in left_out or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if isinstance(parameter.default, dict) or hasattr(Options, name):
            raise UnknownOptimizer(
                f"the argument {name!r} of {class_name} cannot be an option of a dotted path; describe the optimizer "
                "with a row and lightning_optim.register()",
                code="LO104",
            )
        help = f"argument of {class_name}"
        if parameter.default is parameter.empty:
            fields.insert(0, (name, Any, required(help, scope="constructor")))
        else:
            # A dataclass takes no mutable defaults, and betas=[0.9, 0.99] means a tuple.
            default = tuple(parameter.default) if isinstance(parameter.default, (list, set)) else parameter.default
            fields.append((name, _type_of(default, parameter.annotation), option(default, help, scope="constructor")))
    return make_dataclass(f"{class_name}Options", fields, bases=(Options,), frozen=True)


def _type_of(default: Any, annotation: Any) -> Any:
    if not isinstance(default, (bool, int, float, str)):
        return Any
    # A default such as momentum=0 may mean any number.
    kind = int | float if isinstance(default, int) and not isinstance(default, bool) else type(default)
    # As timm's max_grad_norm: Optional[float] = 1.0, also where annotations are kept as text.
    return kind | None if re.search(r"\b(None|Optional)\b", str(annotation)) else kind


REGISTRY = Registry(ROWS)


def refuse_unknown(where: str, given: Mapping[str, Any], allowed: Collection[str], optim: object) -> None:
    """Raises :class:`InvalidOption` if there are unknown arguments, with what to write instead.

    Args:
        where: What was called.
        given: The given arguments.
        allowed: The known ones.
        optim: The requested identifier, whose options may be meant.
    """
    unknown = {name: value for name, value in given.items() if name not in allowed}
    if unknown:
        options = (info.name for info in describe(REGISTRY[optim].options)) if optim in REGISTRY else ()  # type: ignore[index]
        refuse_arguments(where, unknown, allowed, options)


def register(spec: OptimizerSpec) -> None:
    """Adds an optimizer to the table of this process; see :meth:`Registry.register`."""
    REGISTRY.register(spec)
