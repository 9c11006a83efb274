"""What is registered with Lightning, and for whom."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry

from lightning_optim import NPUAccelerator, NPUStrategy, accelerators, strategies


@pytest.mark.parametrize(
    ("registry", "argument", "base", "ours", "register"),
    [
        (StrategyRegistry, "strategy", SingleDeviceStrategy, NPUStrategy, strategies.register),
        (AcceleratorRegistry, "accelerator", Accelerator, NPUAccelerator, accelerators.register),
    ],
)
def test_a_name_that_is_taken_stays_its_owner_s(
    registry: dict[str, Any], argument: str, base: type, ours: type, register: Callable[[], None]
) -> None:
    entry = registry["npu"]
    theirs = type("Theirs", (base,), {"__module__": "a_vendor"})
    # Ours of an earlier import of the same module, which is exchanged without a word.
    earlier = type(ours.__name__, (base,), {"__module__": ours.__module__, "__qualname__": ours.__qualname__})
    try:
        registry["npu"] = {**entry, argument: theirs}
        with pytest.warns(UserWarning, match=r"'npu' stays a_vendor\.Theirs") as caught:
            register()
        assert registry["npu"][argument] is theirs
        registry["npu"] = {**entry, argument: earlier}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            register()
        assert registry["npu"][argument] is ours
    finally:
        registry["npu"] = entry
    (warning,) = caught
    assert f"{ours.__module__}.{ours.__qualname__} is not registered" in str(warning.message)
    assert f"Trainer({argument}=lightning_optim.{ours.__qualname__}())" in str(warning.message)
