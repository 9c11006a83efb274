"""A small GPT that learns the Python documentation byte by byte, on the command line; the text ships with CPython.

Any optimizer, by name::

    python examples/gpt.py fit --config examples/gpt.yaml --optim lion_8bit --lr 3e-4

The model is in ``lightning_optim/bench/_gpt.py``: ``lightning-optim bench`` trains it where no other is named.
"""

from __future__ import annotations

from lightning_optim import OptimCLI
from lightning_optim.bench import GPT, PythonTopics

__all__ = ["GPT", "PythonTopics"]

if __name__ == "__main__":
    OptimCLI(GPT, PythonTopics)
