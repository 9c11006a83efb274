"""Optimizers of the big collections themselves; ``make test-collections`` installs them."""

from __future__ import annotations

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("pytorch_optimizer") else ["test_*.py"]
