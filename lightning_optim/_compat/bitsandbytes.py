"""What is used of bitsandbytes that it does not promise."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quietly"]

_LOGGER, _WORRY = "bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward"


@contextmanager
def quietly() -> Iterator[None]:
    """Drops what bitsandbytes says inside, when it is imported, of a kernel that only its 4-bit layers need.

    Otherwise its CPU backend worries users of optimizers with a warning that it found the kernel in no hub.
    """

    def keep(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(_WORRY)

    log = logging.getLogger(_LOGGER)
    log.addFilter(keep)
    try:
        yield
    finally:
        log.removeFilter(keep)
