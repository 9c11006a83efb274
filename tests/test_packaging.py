"""The archives that users install are complete, and the wheel works without the repository."""

from __future__ import annotations

import email
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

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


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source archive, and in ``again`` the wheel that is built from the latter."""
    folder = tmp_path_factory.mktemp("archives")
    source = folder / "source"
    # A copy: building leaves files behind.
    for name in ("lightning_optim", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.cfg", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, source)
    _build("sdist", source, folder)
    _build("wheel", source, folder)
    (archive,) = folder.glob("lightning_optim-*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    (folder / "again").mkdir()
    _build("wheel", unpacked, folder / "again")
    return folder


def _build(kind: str, source: Path, target: Path) -> None:
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(target)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=source, timeout=120, stdout=subprocess.DEVNULL)


def _contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def test_the_wheel_works_by_itself(archives: Path, tmp_path: Path) -> None:
    (wheel,) = archives.glob("*.whl")
    names = set(_contents(wheel))
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "lightning_optim").rglob("*.py")}
    assert sources | {"lightning_optim/py.typed"} == {name for name in names if name.startswith("lightning_optim/")}
    others = {name for name in names if not name.startswith("lightning_optim/")}
    assert all(re.match(r"lightning_optim-[^/]+\.dist-info/", name) for name in others), others
    assert any(name.endswith("licenses/LICENSE") for name in others)
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    subprocess.run([sys.executable, "-c", _USE, str(tmp_path / "site")], check=True, cwd=tmp_path, timeout=120)


def test_the_source_archive_has_what_builds_the_same_wheel(archives: Path) -> None:
    (wheel,), (again,) = archives.glob("*.whl"), (archives / "again").glob("*.whl")
    assert again.name == wheel.name
    assert _contents(again) == _contents(wheel)
    (archive,) = archives.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        beside = {name.split("/")[1] for name in opened.getnames() if "/" in name}
    # No tests: they need more of the repository than an archive has.
    assert beside == {
        *("lightning_optim", "lightning_optim.egg-info", "PKG-INFO", "pyproject.toml", "setup.cfg", "MANIFEST.in"),
        *("README.md", "LICENSE", "CHANGELOG.md"),
    }


def test_the_metadata_is_what_an_index_shows(archives: Path) -> None:
    (wheel,) = archives.glob("*.whl")
    (text,) = (data.decode() for name, data in _contents(wheel).items() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_string(text)
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()
    assert {"bitsandbytes", "torchao", "schedulefree", "optimi", "flashoptim", "cli", "all"} <= set(
        metadata.get_all("Provides-Extra")
    )
