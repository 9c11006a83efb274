"""States that are sparse, as the momentum of an embedding with ``sparse=True``, are saved and looked at."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from lightning_optim import build_optimizer


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_sparse_momentum_is_saved_and_said_if_it_is_not_finite(value: float) -> None:
    embedding = nn.Embedding(8, 4, sparse=True)
    optimizer = build_optimizer(embedding, "sgd", lr=0.1, weight_decay=0.0, optim_args={"momentum": 0.9})
    (embedding(torch.tensor([1, 2, 2])).sum() * value).backward()
    optimizer.step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (state,) = optimizer.state_dict()["state"].values()
    assert state["momentum_buffer"].is_sparse
    assert ["has become NaN" in str(warning.message) for warning in caught] == ([] if value == 1.0 else [True])
