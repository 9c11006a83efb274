"""Packages under ``stand_ins/`` in the place of those that cannot be installed or run here."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

STAND_INS = Path(__file__).parent / "stand_ins"
_ADAPTERS = "lightning_optim.optimizers.adapters"


@contextmanager
def imported_anew(monkeypatch: pytest.MonkeyPatch, adapter: str, *packages: str) -> Iterator[None]:
    """Inside, has the packages and our adapter of them imported anew; the present modules are back afterwards."""
    with monkeypatch.context() as inner:
        _forget(inner, adapter, packages)
        yield
        _forget(inner, adapter, packages)


def _forget(monkeypatch: pytest.MonkeyPatch, adapter: str, packages: tuple[str, ...]) -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] in packages or name == f"{_ADAPTERS}.{adapter}":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(f"{_ADAPTERS}.{adapter}", raising=False)


def assert_real_one_prints_the_same(stand_in: Path, code: str) -> None:
    """Runs code over the real package and over its stand-in, in processes of their own, as both have the same name."""
    real, instead = (
        subprocess.run([sys.executable, "-c", start + code], check=True, capture_output=True, text=True).stdout
        for start in ("", f"import sys; sys.path.insert(0, {str(stand_in)!r})\n")
    )
    assert real == instead
