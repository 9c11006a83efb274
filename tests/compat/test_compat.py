"""What ``lightning_optim._compat`` relies on does what it is relied on for: one test each, for any version.

A failure names the package, what it does otherwise, who needs it, and the function to mend.
"""

from __future__ import annotations

import ast
import importlib
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.overrides import TorchFunctionMode

import lightning_optim
from tests.compat.contract import relied_on

DOORS = Path(lightning_optim.__file__).parent / "_compat"
CPU = torch.device("cpu")


def names(door: Path) -> list[str]:
    assigned = (node for node in ast.parse(door.read_text()).body if isinstance(node, ast.Assign))
    return next(ast.literal_eval(node.value) for node in assigned if ast.unparse(node.targets[0]) == "__all__")


def test_everything_has_a_contract() -> None:
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    doors = [path for path in DOORS.glob("*.py") if path.name not in ("__init__.py", "kernels.py")]
    assert doors
    assert not [f"{door.stem}.{name}" for door in doors for name in names(door) if f'"{door.stem}.{name}"' not in tests]


def test_a_failure_says_what_to_mend() -> None:
    with (
        pytest.raises(pytest.fail.Exception) as failed,
        relied_on("torch.no_such_name", "nothing"),
    ):
        raise AssertionError("not reached")
    text = str(failed.value)
    assert text.startswith(f"torch {torch.__version__.partition('+')[0]}")
    assert "no attribute 'no_such_name'\nMend no_such_name in lightning_optim/_compat/torch.py; nothing" in text


# --- torch -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def stepped() -> AdamW:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = AdamW([parameter], lr=0.1)
    parameter.grad = torch.ones(2)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("torch.AnyBatchNorm", (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)),
        ("torch.NormWithStatistics", (nn.BatchNorm1d, nn.SyncBatchNorm, nn.InstanceNorm2d, nn.LazyInstanceNorm1d)),
        ("torch.AnyConvolution", (nn.Conv1d, nn.Conv3d, nn.ConvTranspose2d)),
    ],
)
def test_layers_have_their_base_class(name: str, classes: tuple[type, ...]) -> None:
    with relied_on(name, "what is decayed, projected and recalibrated") as base:
        assert all(issubclass(each, base) for each in classes), classes
        assert not issubclass(nn.Linear, base)
        assert not issubclass(nn.LayerNorm, base)


def test_scalers_know_an_optimizer_that_unscales_by_itself() -> None:
    with relied_on("torch.SCALES", "strategy='fused' with precision='16-mixed'") as attribute:
        parameter = nn.Parameter(torch.ones(2))
        optimizer, handed = SGD([parameter]), []
        optimizer.step = lambda *args, **kwargs: handed.append(hasattr(optimizer, "found_inf"))  # type: ignore
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        for scales in (False, True):
            setattr(optimizer, attribute, scales)
            scaler.scale(parameter.sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        assert handed == [False, True], f"the scaler handed over found_inf: {handed}"


def test_the_state_of_a_schedule_of_steps_is_known() -> None:
    with relied_on("torch.STEP_SCHEDULE_STATE", "resuming with another program's schedule") as known:
        state = LambdaLR(SGD([nn.Parameter(torch.ones(2))]), lambda step: 1.0).state_dict()
        assert not state.keys() - known, f"new in the state: {sorted(state.keys() - known)}"
        assert {"last_epoch", "_last_lr"} <= state.keys()


def test_step_hooks_are_found() -> None:
    with relied_on("torch.step_pre_hooks", "every layerwise optimizer") as hooks:
        optimizer = SGD([nn.Parameter(torch.ones(2))])
        assert hooks(optimizer) == ()
        hook = lambda optimizer, args, kwargs: None  # noqa: E731
        optimizer.register_step_pre_hook(hook)
        assert hooks(optimizer) == (hook,)


def test_hooks_of_loading_are_found() -> None:
    with relied_on("torch.load_hooks", "keeping the kernel when a checkpoint is loaded") as hooks:
        optimizer = SGD([nn.Parameter(torch.ones(2))])
        assert hooks(optimizer) == ((), ())
        before, after = lambda optimizer, state: state, lambda optimizer: None
        optimizer.register_load_state_dict_pre_hook(before)
        optimizer.register_load_state_dict_post_hook(after)
        assert hooks(optimizer) == ((before,), (after,))


def test_hooks_of_state_dicts_are_found() -> None:
    with relied_on("torch.state_dict_hooks", "several optimizers as one") as hooks:
        optimizer = SGD([nn.Parameter(torch.ones(2))])
        assert hooks(optimizer) == ((), ())
        before, after = lambda optimizer: None, lambda optimizer, state: state
        optimizer.register_state_dict_pre_hook(before)
        optimizer.register_state_dict_post_hook(after)
        assert hooks(optimizer) == ((before,), (after,))


def test_a_bare_optimizer_steps_as_the_one_it_is_made_of(stepped: AdamW) -> None:
    with relied_on("torch.bare_optimizer", "every layerwise optimizer") as bare_optimizer:
        ran: list[Optimizer] = []
        stepped.register_step_pre_hook(lambda optimizer, args, kwargs: ran.append(optimizer))
        made = bare_optimizer(AdamW, vars(stepped))
        made.step()
        (parameter,) = stepped.param_groups[0]["params"]
        assert made.state is stepped.state
        assert stepped.state[parameter]["step"] == 2
        assert not ran, "it ran the other's hooks"


def test_an_optimizer_keeps_its_hooks_in_these_attributes() -> None:
    with relied_on("torch.HOOK_ATTRIBUTES", "every layerwise optimizer") as attributes:
        optimizer = SGD([nn.Parameter(torch.ones(2))])
        optimizer.register_step_pre_hook(lambda *args: None)
        optimizer.register_step_post_hook(lambda *args: None)
        assert [len(vars(optimizer)[name]) for name in attributes] == [1, 1]
        hooks = {name for name in vars(optimizer) if "step" in name and name.endswith("hooks")}
        assert hooks == set(attributes), f"step hooks are in {sorted(hooks)}"


def test_a_step_is_found_without_its_hooks(stepped: AdamW) -> None:
    with relied_on("torch.unhooked", "every layerwise optimizer, and those of other packages") as unhooked:
        ran: list[Optimizer] = []
        stepped.register_step_pre_hook(lambda optimizer, args, kwargs: ran.append(optimizer))
        unhooked(AdamW.step)(stepped)
        (parameter,) = stepped.param_groups[0]["params"]
        assert stepped.state[parameter]["step"] == 2
        assert not ran, "it still runs hooks"
        assert unhooked(unhooked(AdamW.step)) is unhooked(AdamW.step)


def test_a_scaler_tells_what_it_has_unscaled() -> None:
    with relied_on("torch.has_unscaled", "OptimizerMonitor with precision='16-mixed'") as has_unscaled:
        weight = nn.Parameter(torch.ones(2))
        optimizer, scaler = SGD([weight]), torch.amp.GradScaler("cpu")
        scaler.scale(weight.sum()).backward()
        assert not has_unscaled(scaler, optimizer)
        scaler.unscale_(optimizer)
        assert has_unscaled(scaler, optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert not has_unscaled(scaler, optimizer)


@pytest.mark.parametrize("what", ["torch.mark_as_stepped", "torch.mark_as_wrapped"])
def test_a_schedule_believes_that_its_optimizer_steps(what: str) -> None:
    def step(optimizer: Any = None) -> None:
        return None

    def messages(mark: Any) -> list[str]:
        optimizer = SGD([nn.Parameter(torch.ones(2))])
        schedule = LambdaLR(optimizer, lambda step: 1.0)
        if what == "torch.mark_as_stepped":
            mark(optimizer)
        else:
            optimizer.step()
            optimizer.step = step  # type: ignore[assignment]
            mark(step)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            schedule.step()
        return [str(warning.message) for warning in caught]

    with relied_on(what, "lr_scheduler='module' and every layerwise optimizer") as mark:
        assert messages(lambda _: None), "torch no longer warns: this may go"
        assert not messages(mark), messages(mark)


def test_a_schedule_may_go_on_from_other_rates() -> None:
    schedule = LambdaLR(SGD([nn.Parameter(torch.ones(2))], lr=1.0), lambda step: 1.0)
    with relied_on("torch.set_last_rates", "override_on_resume=['lr']") as set_last_rates:
        set_last_rates(schedule, [0.5])
        assert schedule.get_last_lr() == [0.5]
    with relied_on("torch.set_step_count", "every lr_scheduler by name") as set_step_count:
        set_step_count(schedule, 2)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            schedule.step()


def test_devices_for_capturable_are_known() -> None:
    with relied_on("torch.capturable_devices", "the rule for capturable=True") as capturable_devices:
        assert {"cuda", "xpu", "xla"} <= set(capturable_devices())
        assert "cpu" not in capturable_devices()


def test_fused_kernels_are_known() -> None:
    with relied_on("torch.has_fused_kernel", "strategy='fused'") as has_fused_kernel:
        assert all(has_fused_kernel(kind, CPU) for kind in (AdamW, SGD, Adagrad))
        assert not has_fused_kernel(AdamW, torch.device("meta"))


def test_fused_sgd_on_half_is_known() -> None:
    with relied_on("torch.sgd_is_wrong_on_half", "strategy='fused' with SGD") as is_wrong:
        parameter = nn.Parameter(torch.zeros(64, dtype=torch.bfloat16))
        parameter.grad = torch.ones_like(parameter)
        SGD([parameter], lr=1.0, fused=True).step()
        assert is_wrong() is not bool((parameter == -1).all())


def test_tensors_are_grouped_in_the_order_of_torchs_norm() -> None:
    with relied_on("torch.group_by_device_and_dtype", "gradient clipping of layerwise optimizers") as group:
        dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float32, torch.bfloat16)
        tensors = [torch.rand((), dtype=dtype) for dtype in dtypes * 4]
        groups = group(tensors)
        assert sorted(len(alike) for alike in groups) == [4, 8, 8]
        assert all(len({tensor.dtype for tensor in alike}) == 1 for alike in groups)
        ordered = torch.stack([tensor for alike in groups for tensor in alike])
        total = torch.nn.utils.get_total_norm(tensors)
        assert torch.equal(torch.linalg.vector_norm(ordered), total), "torch adds norms in another order"


def test_a_sparse_gradient_hands_out_its_entries() -> None:
    with relied_on("torch.entries", "the refusal of layerwise optimizers that couple their parameters") as entries:
        embedding = nn.Embedding(3, 1, sparse=True)
        (embedding(torch.tensor([0, 0])).flatten() * torch.tensor([1.0, -1.0])).sum().backward()
        assert embedding.weight.grad is not None
        assert entries(embedding.weight.grad).flatten().tolist() == [1.0, -1.0]


def test_flattened_parameters_are_known() -> None:
    with relied_on("torch.is_flattened", "the error for Trainer(strategy='fsdp')") as is_flattened:
        from torch.distributed.fsdp._common_utils import _set_fsdp_flattened

        parameter = nn.Parameter(torch.ones(2))
        assert not is_flattened(parameter)
        _set_fsdp_flattened(parameter)
        assert is_flattened(parameter)


def test_compiled_graphs_can_be_kept_from_donating_buffers() -> None:
    with relied_on("torch.set_buffer_donation", "layerwise clipping of compiled modules") as set_buffer_donation:
        from torch._functorch.config import patch

        with patch(donated_buffer=True):
            assert set_buffer_donation(False) is True
            assert set_buffer_donation(True) is False


def test_hooks_are_not_compiled_and_know_what_compiles() -> None:
    seen: list[bool] = []
    compiled: list[str] = []
    parameter = nn.Parameter(torch.ones(2))

    def called() -> Tensor:
        return torch.ones(1).neg()

    def hook(_: Tensor) -> None:
        torch.ones(1).abs()
        seen.append(frame_compiler() is not None)
        called()

    def backward() -> None:
        parameter.sum().backward()

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        compiled.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    with (
        relied_on("torch.frame_compiler", "layerwise steps under torch.compile") as frame_compiler,
        relied_on("torch.unseen_by_compiler", "layerwise steps under torch.compile") as unseen_by_compiler,
    ):
        parameter.register_post_accumulate_grad_hook(unseen_by_compiler(hook))
        backward()
        torch.compile(backward, backend=backend)()
        assert seen == [False, True]
        assert "neg" in compiled
        assert "abs" not in compiled, "a hook that asks the compiler to skip it is compiled"


def test_function_modes_are_found_and_left() -> None:
    seen: list[str] = []

    class Sees(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func.__name__)
            return func(*args, **(kwargs or {}))

    with relied_on("torch.without_current_function_mode", "telling who reads gradients") as without, Sees():
        with without():
            torch.ones(1).neg()
        assert seen == [], f"the mode still sees {seen}"
    with relied_on("torch.current_function_mode", "telling who reads gradients") as current_function_mode:
        assert current_function_mode() is None
        with Sees() as mode:
            assert current_function_mode() is mode
            # Another thread has modes of its own.
            found: list[Any] = []
            thread = threading.Thread(target=lambda: found.append(current_function_mode()))
            thread.start()
            thread.join()
            assert found == [None]


def test_a_refused_tensor_subclass_is_known(tmp_path: Path) -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    with relied_on("torch.refuses_wrapper_subclass", "old checkpoints with torchao's tensors") as refuses:
        path = tmp_path / "file.pt"
        torch.save(TwoTensor(torch.ones(2), torch.ones(2)), path)
        with pytest.raises(Exception, match=r".") as raised:
            torch.load(path, map_location=lambda storage, location: storage, weights_only=False)
        assert refuses(raised.value), f"the error is: {raised.value}"
        assert not refuses(FileNotFoundError("no such file"))


def test_operations_over_lists_equal_those_of_each_tensor() -> None:
    def lists() -> list[list[Tensor]]:
        return [[torch.arange(1.0, 4.0) + number, torch.full((2, 2), 2.0 + number)] for number in range(3)]

    with relied_on("kernels.foreach_add_", "every optimizer of ours"):
        kernels = importlib.import_module("lightning_optim._compat.kernels")
        a, b, c = lists()
        tensors = list(zip(a, b, c, strict=True))
        for name, extra, expected in (
            ("add", [b], lambda x, y, z: x + 0.5 * y),
            ("lerp", [b, 0.25], lambda x, y, z: torch.lerp(x, y, 0.25)),
            ("neg", [], lambda x, y, z: -x),
            ("div", [b], lambda x, y, z: x / y),
            ("sqrt", [], lambda x, y, z: x.sqrt()),
            ("norm", [], lambda x, y, z: torch.linalg.vector_norm(x)),
        ):
            given = {"alpha": 0.5} if name == "add" else {}
            made = getattr(kernels, f"foreach_{name}")(a, *extra, **given)
            assert all(torch.equal(one, expected(*each)) for one, each in zip(made, tensors, strict=True)), name
        for name, extra, given, expected in (
            ("add_", [b], {"alpha": 0.5}, lambda x, y, z: x + 0.5 * y),
            ("sub_", [b], {}, lambda x, y, z: x - y),
            ("mul_", [2.0], {}, lambda x, y, z: x * 2),
            ("div_", [2.0], {}, lambda x, y, z: x / 2),
            ("clamp_max_", [2.0], {}, lambda x, y, z: x.clamp(max=2)),
            ("clamp_min_", [2.0], {}, lambda x, y, z: x.clamp(min=2)),
            ("lerp_", [b, 0.25], {}, lambda x, y, z: torch.lerp(x, y, 0.25)),
            ("addcmul_", [b, c, 0.5], {}, lambda x, y, z: torch.addcmul(x, y, z, value=0.5)),
            ("addcdiv_", [b, c, 0.5], {}, lambda x, y, z: torch.addcdiv(x, y, z, value=0.5)),
            ("copy_", [b], {}, lambda x, y, z: y),
        ):
            own, before = lists()[0], zip(*lists(), strict=True)
            getattr(kernels, f"foreach_{name}")(own, *extra, **given)
            assert all(torch.equal(one, expected(*each)) for one, each in zip(own, before, strict=True)), name


def test_the_fused_adamw_steps_as_torchs_own_does() -> None:
    with relied_on("kernels.fused_adamw_", "GaLore, APOLLO and GrokAdamW") as fused_adamw_:
        parameter, other = (nn.Parameter(torch.arange(1.0, 5.0)) for _ in range(2))
        gradient = torch.tensor([1.0, -2.0, 0.5, 0.0])
        parameter.grad = gradient.clone()
        AdamW([parameter], lr=0.1, weight_decay=0.1, fused=True).step()
        moments = [torch.zeros(4)], [torch.zeros(4)]
        options = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.1, "eps": 1e-8}
        with torch.no_grad():
            fused_adamw_(
                [other], [gradient], *moments, [], [torch.tensor(1.0)], amsgrad=False, maximize=False, **options
            )
        assert torch.equal(parameter, other)
