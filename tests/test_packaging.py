"""The wheel that users install is complete and works without the repository."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

_USE = """
import sys
sys.path.insert(0, sys.argv[1])
import lightning_optim
assert lightning_optim.__file__.startswith(sys.argv[1]), lightning_optim.__file__
import torch
from lightning_optim import REGISTRY, build_optimizer
for name in REGISTRY.plain:
    if REGISTRY[name].devices is None or "cpu" in REGISTRY[name].devices:
        build_optimizer(torch.nn.Linear(2, 2), name)
from lightning_optim.command import main
sys.exit(main(["list"]))
"""


def test_the_wheel_works_by_itself(tmp_path: Path) -> None:
    source = tmp_path / "source"
    # A copy: building leaves files behind.
    shutil.copytree(ROOT / "lightning_optim", source / "lightning_optim", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*build, str(source)], check=True, timeout=120)
    (wheel,) = tmp_path.glob("lightning_optim-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "lightning_optim").rglob("*.py")}
    assert sources | {"lightning_optim/py.typed"} == {name for name in names if name.startswith("lightning_optim/")}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    subprocess.run([sys.executable, "-c", _USE, str(tmp_path / "site")], check=True, cwd=tmp_path, timeout=120)
