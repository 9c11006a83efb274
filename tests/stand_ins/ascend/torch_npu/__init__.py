"""A stand-in for torch_npu: a device "npu" that computes on the CPU, its optimizer and its process group.

torch loads the real package by itself when it is imported, through an entry point, and so it loads this one.
"""

from torch_npu.device import register_device
from torch_npu.hccl import register_backend


def _autoload() -> None:
    register_device()
    register_backend()
