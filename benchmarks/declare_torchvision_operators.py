"""Lets a torchvision be imported whose compiled operators do not fit the build of torch, by declaring them.

``make test-collections`` and ``make survey`` run it where ``import torchvision`` fails: PyPI's wheel is linked against
a torch for CUDA, and beside one for the CPU its library cannot be loaded. timm imports torchvision, and its optimizers
call none of these operators. It changes the installed package in the environment that runs it::

    .venv-collections/bin/python benchmarks/declare_torchvision_operators.py
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

DECLARATIONS = """import torch as _torch

_library = _torch.library.Library("torchvision", "DEF")
_library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def main() -> None:
    """Writes the declarations in front of the package's ``__init__.py``, once."""
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        raise SystemExit("torchvision is not installed")
    file = Path(found.origin)
    code = file.read_text(encoding="utf-8")
    if not code.startswith(DECLARATIONS):
        file.write_text(DECLARATIONS + code, encoding="utf-8")
        print("torchvision's compiled operators do not fit this torch: declared, and not to be called")


if __name__ == "__main__":
    main()
