"""Stand-in of NVIDIA's apex; see ../../README.md."""

from . import optimizers as optimizers
