"""Importing the package is cheap and silent, and its modules import each other in one direction only."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_optim

ROOT = Path(lightning_optim.__file__).parent

# From the bottom to the top; a module may import what stands on an earlier line, and its own package. A package stands
# for all its modules, unless one is named.
LAYERS = (
    ("errors",),
    ("misnomers", "plain", "quiet"),
    ("availability", "options", "parameters", "trust"),
    ("spec", "target_modules", "layer_decay", "curves", "schedule_state"),
    ("optimizers", "arguments"),
    ("adapters", "catalog"),
    ("registry",),
    ("param_groups", "schedules", "following", "memory", "layerwise"),
    ("resume",),
    ("rules",),
    ("config",),
    ("factory",),
    ("report",),
    ("packages",),
    ("callbacks.attached",),
    (
        "callbacks.schedule_free",
        "callbacks.gradient_readers",
        "callbacks.grokking",
        "callbacks.manual_schedule",
        "callbacks.old_checkpoints",
        "callbacks.report",
        "callbacks.resume",
        "callbacks.standstill",
        "callbacks.used",
    ),
    ("length",),
    ("callbacks.layerwise", "expected"),
    ("callbacks.unattended",),
    ("accelerators",),
    ("strategies",),
    ("callbacks.finders", "callbacks.plateau", "callbacks.thawed"),
    ("integration",),
    ("mixin",),
    ("callbacks.optim", "callbacks"),
    ("",),  # the package itself: public names
    ("cli",),
    ("command",),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
FIRST_WITH_LIGHTNING = RANK["packages"]
OPTIONAL = {"bitsandbytes", "torchao", "schedulefree", "optimi", "torch_xla", "torch_npu", "apex", "amp_C"}
# Where an optional package is imported at all: an adapter, at its top; or a function that cannot do without.
MAY_IMPORT_OPTIONAL = {"adapters", "cli", "callbacks.old_checkpoints", "accelerators.pjrt", "strategies.xla"}

MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").removesuffix(".")
    for path in ROOT.rglob("*.py")
)


def rank(module: str) -> int:
    """The layer of a module, without the package's name."""
    return RANK[module] if module in RANK else RANK[module.partition(".")[0]]


def tree(module: str) -> ast.Module:
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(), str(file))


def imports(node: ast.AST) -> Iterator[str]:
    """The modules and names that are imported when ``node`` runs, type checking aside."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
        for child in node.orelse:
            yield from imports(child)
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative import"
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    for child in ast.iter_child_nodes(node):
        yield from imports(child)


def own_imports(module: str) -> set[str]:
    """The modules of this package that ``module`` imports, without the package's name."""
    found = set()
    for name in imports(tree(module)):
        if name.partition(".")[0] == "lightning_optim":
            inner = name.partition(".")[2]
            # `from package import name`: the longest part that is a module.
            while inner not in MODULES:
                inner = inner.rpartition(".")[0]
            found.add(inner)
    return found


def foreign_imports(module: str) -> set[str]:
    return {name.partition(".")[0] for name in imports(tree(module))} - {"lightning_optim"}


def test_the_layers_name_modules_that_exist() -> None:
    assert {name for name in RANK if not ROOT.joinpath(*name.split(".")).is_dir()} <= set(MODULES)
    assert all(rank(module) >= 0 for module in MODULES)
    assert len(MODULES) > 25


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_to_earlier_layers(module: str) -> None:
    # The package itself hands OptimCLI out on demand.
    later = {"cli"} if module == "" else set()
    package = module.partition(".")[0]
    wrong = {
        other
        for other in own_imports(module) - later
        if rank(other) > rank(module) or (rank(other) == rank(module) and other.partition(".")[0] != package)
    }
    assert not wrong, f"{module or 'lightning_optim'} imports {wrong} from its own layer or a later one"


@pytest.mark.parametrize("module", [module for module in MODULES if rank(module) < FIRST_WITH_LIGHTNING])
def test_the_pipeline_knows_no_lightning(module: str) -> None:
    assert not foreign_imports(module) & {"lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities"}


def test_adapters_are_imported_by_the_table_only() -> None:
    importers = [module for module in MODULES if any(other.startswith("adapters.") for other in own_imports(module))]
    assert importers == []
    targets = {spec.target.partition(":")[0] for spec in lightning_optim.REGISTRY.plain.values()}
    adapters = {f"lightning_optim.{module}" for module in MODULES if module.startswith("adapters.")}
    assert adapters <= targets


@pytest.mark.parametrize("module", MODULES)
def test_optional_packages_are_imported_by_adapters_only(module: str) -> None:
    found = foreign_imports(module) & (OPTIONAL | {"jsonargparse", "transformers", "matplotlib"})
    assert not found or module in MAY_IMPORT_OPTIONAL or module.partition(".")[0] in MAY_IMPORT_OPTIONAL


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

    assert "lightning_optim.factory" in report["new"]
    names = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "lightning_optim" in names
    assert not OPTIONAL & {*names, *report["loaded"]}
    # lightning.pytorch imports what is installed of jsonargparse, matplotlib and others; we add nothing to that.
    assert {name.partition(".")[0] for name in report["new"]} - sys.stdlib_module_names == {"lightning_optim"}
    on_demand = ("lightning_optim.adapters", "lightning_optim.cli", "lightning_optim.command")
    assert not [module for module in report["new"] if module.startswith(on_demand)]


def test_optim_cli_is_handed_out_on_demand() -> None:
    assert lightning_optim.OptimCLI.__module__ == "lightning_optim.cli"
    with pytest.raises(AttributeError, match="has no attribute 'OptimCLY'"):
        _ = lightning_optim.OptimCLY
