"""``python -m tests.stress``: see :mod:`tests.stress`."""

from __future__ import annotations

import sys

from tests.stress.command import main

if __name__ == "__main__":
    sys.exit(main())
