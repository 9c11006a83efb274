"""What to choose: how much memory a module takes with each optimizer, before anything is allocated.

``_estimate.py`` is the front: read it first. Forward and backward of the module's own code run on tensors without
memory (``_fake_run.py``), the layerwise engine says which gradients are alive when (``_replay.py``), and a step of the
optimizer what it takes besides its state (``_temporaries.py``), all counted by one tracker (``_tracker.py``).

``_recommend.py`` ranks what fits by ``_evidence.py``, published claims with their sources, and ``_rankings.py``.
"""

from __future__ import annotations

from lightning_optim.choose._estimate import (
    Accelerator,
    Estimator,
    Setting,
    Strategy,
    compare_memory,
    estimate_memory,
)
from lightning_optim.choose._evidence import CHOOSING, EVIDENCE, Evidence, Source, Task
from lightning_optim.choose._fake_run import lightning_says
from lightning_optim.choose._fakes import PRECISIONS
from lightning_optim.choose._memory_estimate import MemoryEstimate
from lightning_optim.choose._model import as_module, name_of
from lightning_optim.choose._rankings import CLAIMS, RANKED, Claim
from lightning_optim.choose._recommend import Preference, Recommendation, rank, recommend
from lightning_optim.choose._shapes import SHAPES, Shape, Transformer, find_shape
from lightning_optim.choose._tracker import MemoryTracker

__all__ = [
    "CHOOSING",
    "CLAIMS",
    "EVIDENCE",
    "PRECISIONS",
    "RANKED",
    "SHAPES",
    "Accelerator",
    "Claim",
    "Estimator",
    "Evidence",
    "MemoryEstimate",
    "MemoryTracker",
    "Preference",
    "Recommendation",
    "Setting",
    "Shape",
    "Source",
    "Strategy",
    "Task",
    "Transformer",
    "as_module",
    "compare_memory",
    "estimate_memory",
    "find_shape",
    "lightning_says",
    "name_of",
    "rank",
    "recommend",
]
