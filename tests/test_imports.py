"""The house: its rooms import each other one way and by their front doors; importing it is cheap and silent."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import Precision
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import lightning_optim
from tests.compat.test_replaced import REPLACED
from tests.processes import run_fresh

ROOT = Path(lightning_optim.__file__).parent

# CONTRIBUTING.md shows the rooms in their order, for people and for these tests.
_SHOWN = (ROOT.parent / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("```text\nlightning_optim/\n")[2]
ROOMS = tuple(re.findall(r"^ {2}(\w+)(?:/|\.py) ", _SHOWN.partition("```")[0], re.MULTILINE))
RANK = {room: rank for rank, room in enumerate(ROOMS)}
#: Names of the package's own, besides the rooms.
OUTSIDE = {"", "__main__", "_moved", "pytorch_lightning"}
#: May look into another room past its front door: a row into the file of the algorithm that it describes.
LOOKS_INSIDE = {("table.rows", "optimizers")}
#: The room for what is not ours.
COMPAT = "_compat"
LIGHTNING = "_compat.lightning"
PUBLIC = ("", "optimizers", "layerwise", "testing")
OPTIONAL = {
    "bitsandbytes",
    "torchao",
    "schedulefree",
    "optimi",
    "flashoptim",
    "torch_xla",
    "torch_npu",
    "apex",
    "amp_C",
}
# Where an optional package is imported at all: an adapter, at its top; or a function that cannot do without.
MAY_IMPORT_OPTIONAL = (
    "_compat",
    "bench._picture",
    "optimizers.adapters",
    "trainer._cli",
    "trainer.callbacks._checkpoint_files",
    "trainer.accelerators._pjrt",
    "trainer.strategies._xla",
)

MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").removesuffix(".")
    for path in ROOT.rglob("*.py")
)


def room(module: str) -> str:
    return module.partition(".")[0]


def file(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@functools.cache
def tree(module: str) -> ast.Module:
    return ast.parse(file(module).read_text(encoding="utf-8"))


def imports(node: ast.AST, checking: bool) -> Iterator[tuple[str, str]]:
    """The modules imported when ``node`` runs, each with a name taken from it; ``checking`` adds what mypy sees."""
    if not checking and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
        for child in node.orelse:
            yield from imports(child, checking)
        return
    if isinstance(node, ast.Import):
        yield from ((alias.name, "") for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative import"
        yield from ((str(node.module), alias.name) for alias in node.names)
    for child in ast.iter_child_nodes(node):
        yield from imports(child, checking)


def own_imports(module: str) -> Iterator[tuple[str, str]]:
    """The modules of this package that ``module`` imports, lazily or for types, too, each with a name from it."""
    for source, name in imports(tree(module), checking=True):
        package, _, inner = source.partition(".")
        if package == "lightning_optim":
            whole = f"{inner}.{name}".strip(".")
            # `from package import module` imports the module.
            yield (whole, "") if whole in MODULES else (inner, name)


def foreign_imports(module: str) -> set[str]:
    names = {source.partition(".")[0] for source, _ in imports(tree(module), checking=False)}
    return names - {"lightning_optim"}


def door(module: str) -> str:
    """The module that hands out what other rooms take: a room's ``__init__``, in ``_compat`` one for each package."""
    return module if room(module) == COMPAT and module != COMPAT else room(module)


def exported(module: str) -> list[str]:
    """The names of ``__all__``, read from the source."""
    for node in tree(module).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return []


def test_every_module_is_in_a_room() -> None:
    assert len(ROOMS) >= 8
    assert {room(module) for module in MODULES} - OUTSIDE == set(ROOMS)


def test_imports_point_to_earlier_rooms() -> None:
    wrong = [
        f"{module} imports {other}"
        for module in MODULES
        for other, _ in own_imports(module)
        if not {module, other} & OUTSIDE and RANK[room(other)] > RANK[room(module)]
    ]
    # A room asks nothing of the package but its version, or it would import all others.
    wrong += [f"{m} takes {n}" for m in MODULES for other, n in own_imports(m) if not other and n != "__version__"]
    assert not wrong


def test_rooms_are_entered_by_the_front_door() -> None:
    wrong = [
        f"{module} takes {name} from {other}"
        for module in MODULES
        for other, name in own_imports(module)
        if not {module, other} & {*OUTSIDE, "errors"}
        and room(other) != room(module)
        and (other != door(other) or name not in exported(other))
        and not (not name and other.rpartition(".")[2] in exported(room(other)))
        and not any(module.startswith(inside) and room(other) == to for inside, to in LOOKS_INSIDE)
    ]
    assert not wrong


def test_no_module_imports_itself_on_the_way_round() -> None:
    graph = {m: {other for other, name in own_imports(m) if name != "__version__"} - {m} for m in MODULES}
    while ready := {module for module, others in graph.items() if not others & graph.keys()}:
        for module in ready:
            del graph[module]
    assert not graph, f"a circle among {sorted(graph)}"


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_says_what_it_is_and_hands_out(name: str) -> None:
    assert ast.get_docstring(tree(name))
    if name not in ("errors", "trainer"):
        module = importlib.import_module(f"lightning_optim.{name}")
        assert len(exported(name)) == len(set(exported(name)))
        # One of them needs an optional package.
        absent = {"GaLoreAdamW8bit"} if importlib.util.find_spec("bitsandbytes") is None else set()
        for public in set(exported(name)) - absent:
            assert hasattr(module, public)
        for public in set(exported(name)) & absent:
            with pytest.raises(lightning_optim.MissingDependency, match="needs bitsandbytes"):
                getattr(module, public)


def test_modules_that_nobody_else_may_use_begin_with_an_underscore() -> None:
    named = {module.rpartition(".")[2] for module in MODULES if file(module).name != "__init__.py"}
    doors = {module.rpartition(".")[2] for module in MODULES if module.startswith(f"{COMPAT}.")}
    assert {name for name in named - doors if not name.startswith("_")} == {"errors", "pytorch_lightning"}
    assert {module for module in MODULES if file(module).name == "__init__.py"} == {
        *({""} | set(ROOMS) - {"errors"}),
        *("optimizers.adapters", "table.rows", "build.rules"),
        *("trainer.accelerators", "trainer.callbacks", "trainer.strategies"),
    }


def test_no_module_is_longer_than_400_lines() -> None:
    assert {m: n for m in MODULES if (n := len(file(m).read_text(encoding="utf-8").splitlines())) > 400} == {}


def test_nothing_above_the_trainer_knows_lightning() -> None:
    above = [module for module in MODULES if module not in OUTSIDE and RANK[room(module)] < RANK["trainer"]]
    lightning = {"lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities"}
    assert {module for module in above if foreign_imports(module) & lightning} <= {LIGHTNING}
    assert {room(m) for m in MODULES for other, _ in own_imports(m) if other == LIGHTNING} <= {"trainer"}


def test_a_door_to_another_package_needs_no_room() -> None:
    for module in (module for module in MODULES if module.startswith(f"{COMPAT}.")):
        assert exported(module), module
        # errors.py, or the names of the same room.
        assert {room(other) for other, _ in own_imports(module)} <= {"errors"}, module


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def own_names(node: ast.AST) -> Iterator[str]:
    """The names that a line of ours defines, attributes of our own objects included."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
        yield node.attr


def used_names(node: ast.AST) -> Iterator[str]:
    """The names that a line takes from somewhere: by a dot, by an import, or as a string."""
    if isinstance(node, ast.Attribute):
        yield node.attr
    elif isinstance(node, ast.Import):
        yield from (part for alias in node.names for part in alias.name.split("."))
    elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("lightning_optim"):
        yield from (*(node.module or "").split("."), *(alias.name for alias in node.names))
    elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "delattr"):
        yield from (each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str))


def test_private_names_of_others_are_used_in_one_room() -> None:
    ours = {name for module in MODULES for node in ast.walk(tree(module)) for name in own_names(node)}
    found = [
        f"{file(module)}:{node.lineno} uses {name}: put it into a function of lightning_optim/{COMPAT}/ that says who "
        "needs it, and its contract into tests/compat"
        for module in MODULES
        if room(module) != COMPAT
        for node in ast.walk(tree(module))
        for name in used_names(node)
        if is_private(name) and name not in ours
    ]
    assert not found, "\n".join(found)


OVERRIDES = """
import importlib, sys
sys.path[:0] = STAND_INS

def is_ours(cls):
    return cls.__module__.partition(".")[0] == "lightning_optim"

for module in MODULES:
    try:
        loaded = importlib.import_module(f"lightning_optim.{module}".strip("."))
    except ImportError:
        continue  # an adapter whose package is not here
    classes = [cls for cls in vars(loaded).values() if isinstance(cls, type) and is_ours(cls)]
    # Of mixins, too: a class that has them says what they override.
    for cls, own in {(cls, own) for cls in classes for own in cls.__mro__ if is_ours(own)}:
        for base in cls.__mro__:
            for name in vars(own).keys() & vars(base).keys() if not is_ours(base) else ():
                print("override", own.__module__.partition(".")[2], own.__name__, name, base.__qualname__)
"""


def test_private_methods_of_others_are_overridden_in_one_room() -> None:
    stand_ins = [str(ROOT.parent / "tests" / "stand_ins" / name) for name in ("ascend", "nvidia_apex", "flash")]
    modules = [module for module in MODULES if module not in ("__main__", "_moved")]
    done = run_fresh("-c", f"STAND_INS, MODULES = {stand_ins}, {modules}\n{OVERRIDES}")
    assert done.returncode == 0, done.stderr
    found = {tuple(line.split()[1:]) for line in done.stdout.splitlines() if line.startswith("override ")}
    # ABCMeta and Protocol make these of each class.
    made = {"_abc_impl", "_is_protocol"}
    private = {(*rest, name, base) for *rest, name, base in found if is_private(name) and name not in made}
    assert ("_compat.lightning", "ReducesXLA", "_xla_wrap_closure", "XLAPrecision") in private
    assert ("_compat.lightning", "WrapsForAnyDevice", "_setup_model", "DDPStrategy") in private
    wrong = [
        f"{own} of {file(module)} overrides {name} of {base}: do it in a class of lightning_optim/{COMPAT}/ that calls "
        "a method with a public name, and put its contract into tests/compat"
        for module, own, name, base in sorted(private)
        if room(module) != COMPAT
    ]
    assert not wrong, "\n".join(wrong)


def replaced_names(node: ast.AST) -> Iterator[str]:
    """The attributes that a line sets on an object which is not its own."""
    if isinstance(node, ast.Assign):
        for target in node.targets:
            if isinstance(target, ast.Attribute) and ast.unparse(target.value) not in ("self", "cls"):
                yield target.attr
            elif isinstance(target, ast.Subscript) and re.match(r"vars\(|.*\.__dict__$", ast.unparse(target.value)):
                yield ast.unparse(target.slice).strip("'")
    elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "self._replace"):
        yield from (each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str))


def test_methods_of_others_are_replaced_where_a_contract_says_who_calls_them() -> None:
    others = (LightningModule, Trainer, Precision, Profiler, Strategy, GradScaler, Optimizer, LRScheduler)
    methods = {name for other in others for name, _ in inspect.getmembers(other, inspect.isfunction)}
    found = {
        name: f"{file(module)}:{node.lineno} replaces {name} of an object: name it in REPLACED of "
        "tests/compat/test_replaced.py, with a test that it is called there"
        for module in MODULES
        for node in ast.walk(tree(module))
        for name in replaced_names(node)
        if name in methods
    }
    assert not [text for name, text in found.items() if name not in REPLACED]
    assert found.keys() == REPLACED.keys()


def test_adapters_are_imported_by_the_table_only() -> None:
    within = "optimizers.adapters."
    importers = {m for m in MODULES for other, _ in own_imports(m) if other.startswith(within)}
    # The front door hands one of them out on demand.
    assert {m for m in importers if not m.startswith(within)} == {"optimizers"}


def test_optional_packages_are_imported_by_adapters_only() -> None:
    optional = OPTIONAL | {"jsonargparse", "transformers", "matplotlib"}
    wrong = {module: found for module in MODULES if (found := foreign_imports(module) & optional)}
    assert not [module for module in wrong if not module.startswith(MAY_IMPORT_OPTIONAL)]


def test_nobody_imports_the_old_name_of_lightning() -> None:
    assert not [module for module in MODULES if "pytorch_lightning" in foreign_imports(module)]


# --- a fresh process -------------------------------------------------------------------------------------------------

PROBE = """
import json, logging, sys, threading, warnings
import lightning.pytorch
import torch

def handlers():
    names = [None, *logging.root.manager.loggerDict]
    return {str(name): list(map(repr, logging.getLogger(name).handlers)) for name in names}

before = handlers()
filters, modules, threads = list(warnings.filters), set(sys.modules), threading.active_count()
for stream in (sys.stdout, sys.stderr):
    print("--- now the package", file=stream, flush=True)
import lightning_optim
report = {
    "new": sorted(set(sys.modules) - modules),
    "loaded": sorted({name.partition(".")[0] for name in sys.modules}),
    "handlers": [name for name, found in handlers().items() if found != before.get(name, [])],
    "filters": len([entry for entry in warnings.filters if entry not in filters]),
    "threads": threading.active_count() - threads,
    "cuda": torch.cuda.is_initialized(),
}
with open(sys.argv[1], "w") as file:
    json.dump(report, file)
"""


def test_importing_the_package_is_lean_and_silent(tmp_path: Path) -> None:
    """What it costs is printed by ``benchmarks/optimizers.py``: a test of times would fail on a busy machine."""
    file = tmp_path / "report.json"
    command = [sys.executable, "-X", "importtime", "-c", PROBE, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(file.read_text())
    printed = [text.partition("--- now the package\n")[2].splitlines() for text in (done.stdout, done.stderr)]
    assert [line for lines in printed for line in lines if not line.startswith("import time:")] == []
    assert report["handlers"] == []
    assert (report["filters"], report["threads"], report["cuda"]) == (0, 0, False)

    assert "lightning_optim.build._factory" in report["new"]
    names = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "lightning_optim" in names
    assert not OPTIONAL & {*names, *report["loaded"]}
    # lightning.pytorch imports what is installed of jsonargparse, matplotlib and others; we add nothing to that.
    assert {name.partition(".")[0] for name in report["new"]} - sys.stdlib_module_names == {"lightning_optim"}
    on_demand = (
        "lightning_optim.optimizers.adapters",
        "lightning_optim.trainer._cli",
        "lightning_optim.choose",
        "lightning_optim.command",
    )
    assert not [module for module in report["new"] if module.startswith(on_demand)]


def test_optim_cli_is_handed_out_on_demand() -> None:
    assert lightning_optim.OptimCLI.__module__ == "lightning_optim.trainer._cli"
    with pytest.raises(AttributeError, match="has no attribute 'OptimCLY'"):
        _ = lightning_optim.OptimCLY
