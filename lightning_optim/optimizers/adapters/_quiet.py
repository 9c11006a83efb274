"""Messages of other packages that only worry."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

# bitsandbytes' CPU backend wants a kernel for 4-bit layers from a hub when it is imported; no optimizer needs it.
BITSANDBYTES_CPU = ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward")


@contextmanager
def without_records(logger: str, beginning: str) -> Iterator[None]:
    """Drops what a logger says inside if it begins so.

    Args:
        logger: Name of the logger.
        beginning: Of the message, before arguments are put in.
    """

    def keep(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(beginning)

    log = logging.getLogger(logger)
    log.addFilter(keep)
    try:
        yield
    finally:
        log.removeFilter(keep)
