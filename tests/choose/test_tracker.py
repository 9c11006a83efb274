"""The tracker counts each storage once, as long as it lives, and agrees with the allocator and with autograd."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_optim._compat.fake import fake_tensors
from lightning_optim.choose import MemoryTracker

KIB = 1024


def test_bytes_are_counted_while_tensors_live_and_views_are_not_counted_again() -> None:
    with MemoryTracker() as tracker:
        tracker.phase = "first"
        tensor = torch.zeros(KIB // 4)
        views = [tensor.view(2, -1), tensor[10:], tensor.mul_(2)]
        assert tracker.live["other"] == KIB
        del tensor
        assert tracker.live["other"] == KIB
        views.clear()
        assert tracker.live["other"] == 0
        tracker.phase = "second"
        other = torch.zeros(KIB // 8)
        tracker.add([other], "state")
    assert {phase: moment.total for phase, moment in tracker.peaks.items()} == {"first": KIB, "second": KIB // 2}
    assert tracker.most["other"] == KIB
    assert tracker.now().live["state"] == KIB // 2


@pytest.mark.parametrize("fake", [False, True])
def test_what_forward_keeps_is_what_autograd_saves(fake: bool) -> None:
    """Independent of the tracker: the hooks on saved tensors, and the size of the gradients."""
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            saved[id(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        return tensor

    with fake_tensors() if fake else torch.enable_grad():
        model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 32), nn.Softmax(-1))
        inputs = torch.ones(16, 32)
        with MemoryTracker() as tracker:
            tracker.add(model.parameters(), "parameters")
            tracker.add([inputs], "batch")
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = model(inputs).sum()
            kept = tracker.live["other"]
            saved.pop(id(inputs.untyped_storage()))
            # Parameters are saved as views (weight.t()), and so by their storage.
            for parameter in model.parameters():
                saved.pop(id(parameter.untyped_storage()), None)
            assert kept == sum(saved.values()) + loss.nbytes
            loss.backward()
            gradients = [parameter.grad for parameter in model.parameters()]
            tracker.add(gradients, "gradients")
        assert tracker.live["gradients"] == sum(parameter.nbytes for parameter in model.parameters())
