"""Tensors without memory, and modes that see every operation: what ``estimate_memory`` stands on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.compat.contract import relied_on

NEEDED_BY = "lightning_optim.estimate_memory"


def test_fake_tensors_have_shapes_and_gradients_and_no_memory() -> None:
    with relied_on("fake.fake_tensors", NEEDED_BY) as fake_tensors, fake_tensors():
        layer = nn.Linear(2**20, 2**20)
        layer(torch.ones(3, 2**20)).sum().backward()
        assert layer.weight.grad is not None
        assert layer.weight.grad.untyped_storage().nbytes() == 2**42
        with relied_on("fake.FakeTensor", NEEDED_BY) as kind:
            assert type(layer.weight.grad) is kind
        # Real tensors may meet them.
        assert (torch.ones(2) + torch.zeros(2)).shape == (2,)


def test_a_mode_sees_operations_in_backward_and_may_answer_them() -> None:
    seen = []
    with (
        relied_on("fake.DispatchMode", NEEDED_BY) as base,
        relied_on("fake.answer_without_values", NEEDED_BY) as answer,
        relied_on("fake.fake_tensors", NEEDED_BY) as fake_tensors,
    ):

        class Mode(base):  # type: ignore[misc]
            def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                seen.append(str(operation))
                answered, value = answer(operation, args)
                return value if answered else operation(*args, **(kwargs or {}))

        with fake_tensors(), Mode():
            weight = torch.ones(3, requires_grad=True)
            (weight * 2).sum().backward()
            assert (weight.sum().item(), bool((weight > 0).all())) == (0.5, True)
            assert int(torch.ones((), dtype=torch.int64)) == 1
        assert "aten.sum.default" in seen
        assert "aten.expand.default" in seen, "what backward calls"


def test_what_a_mode_is_asked_of_a_tensor_is_answered_as_torch_would() -> None:
    answers = []
    with (
        relied_on("fake.DispatchMode", NEEDED_BY) as base,
        relied_on("fake.answer_attribute", NEEDED_BY) as answer,
        relied_on("fake.fake_tensors", NEEDED_BY) as fake_tensors,
    ):

        class Mode(base):  # type: ignore[misc]
            def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if operation.namespace != "prim":
                    return operation(*args, **(kwargs or {}))
                answers.append((answer(operation, args), operation(*args)))
                return answers[-1][0]

        with fake_tensors(), Mode():
            # In C++, backward asks on which device gradients are.
            (torch.ones(3, requires_grad=True) * 2).sum().backward()
    assert answers
    assert all(ours == theirs for ours, theirs in answers)


def test_what_is_only_written_in_place_is_known_and_nothing_else() -> None:
    aten = torch.ops.aten
    with (
        relied_on("fake.answer_in_place", NEEDED_BY) as answer,
        relied_on("fake.fake_tensors", NEEDED_BY) as fake_tensors,
        fake_tensors(),
    ):
        tensor, many = torch.ones(2, 3), [torch.ones(2), torch.ones(3)]
        for operation in (aten.add_.Tensor, aten.copy_.default, aten.normal_.default, aten.zero_.default):
            assert answer(operation, (tensor,)) == (True, tensor)
        assert answer(aten._foreach_add_.Scalar, (many, 1)) == (True, None)
        assert answer(aten._fused_adamw_.default, (many,)) == (True, None)
        # Others make tensors, or change what one is.
        views = (aten.t_.default, aten.unsqueeze_.default, aten.resize_.default, aten.set_.source_Tensor)
        for operation in (*views, aten.add.Tensor, aten._foreach_add.Scalar, aten.mm.default):
            assert answer(operation, (tensor,)) == (False, None)
    # Real ones are computed.
    assert answer(aten.add_.Tensor, (torch.ones(2),)) == (False, None)


def test_what_needs_values_says_so() -> None:
    with relied_on("fake.NEEDS_VALUES", NEEDED_BY) as errors, relied_on("fake.fake_tensors", NEEDED_BY) as fake_tensors:
        with fake_tensors(), pytest.raises(errors):
            torch.nonzero(torch.ones(3))
        with fake_tensors(), pytest.raises(errors):
            torch.ones(3).sum().item()


def test_tensors_are_found_in_structures_and_in_subclasses() -> None:
    one, two = torch.ones(1), torch.ones(2)
    with relied_on("fake.tensors_in", NEEDED_BY) as tensors_in:
        assert tensors_in({"a": [one, (two, 3)], "b": None}) == [one, two]
    with relied_on("fake.map_tensors", NEEDED_BY) as map_tensors:
        changed = map_tensors(lambda tensor: tensor + 1, {"a": [one, 3]})
        assert changed == {"a": [one + 1, 3]}

    torchao = pytest.importorskip("torchao.optim.subclass_8bit")
    state = torchao.OptimState8bit.zeros((512,), block_size=256)
    with relied_on("fake.tensors_in", NEEDED_BY) as tensors_in:
        assert sum(tensor.nbytes for tensor in tensors_in([state])) == 512 + 2 * 4 + 256 * 4


def test_tensors_made_outside_of_modes_are_real() -> None:
    with (
        relied_on("fake.without_modes", "galore_adamw_8bit after estimate_memory") as without_modes,
        relied_on("fake.fake_tensors", NEEDED_BY) as fake_tensors,
        fake_tensors(),
        without_modes(),
    ):
        table: Tensor = torch.arange(3)
    assert table.tolist() == [0, 1, 2]
