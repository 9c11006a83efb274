"""Short names of classes in collections, over stand-ins; ``make test-collections`` resolves those of the real ones."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_optim import (
    REGISTRY,
    IncompatibleTrainer,
    InvalidOption,
    MissingDependency,
    OptimCLI,
    OptimConfig,
    UnknownOptimizer,
    UntrustedOptimizer,
    build_optimizer,
)
from lightning_optim.command import main
from lightning_optim.testing import check_results, held
from tests.models import LitTokens, loader, trainer

STAND_INS = Path(__file__).parents[1] / "stand_ins" / "collections"
PACKAGES = ("timm", "pytorch_optimizer", "heavyball")


def forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in PACKAGES]:
        del sys.modules[name]


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Where packages are looked for; what is imported meanwhile is forgotten."""
    forget()
    yield monkeypatch
    forget()


@pytest.fixture
def collections(path: pytest.MonkeyPatch) -> None:
    path.syspath_prepend(STAND_INS)


@pytest.mark.usefixtures("collections")
@pytest.mark.parametrize(
    ("name", "implementation", "rate", "options"),
    [
        ("timm:lamb", "timm.optim.Lamb", 1e-3, {"max_grad_norm": 1.0, "trust_clip": False}),
        ("timm:LAMB", "timm.optim.Lamb", 1e-3, {"trust_clip": False}),
        ("timm:lambc", "timm.optim.Lamb", 1e-3, {"trust_clip": True}),
        ("timm:Kron", "timm.optim.Kron", 1e-3, {"trust_clip": False}),
        ("timm:sgd", "torch.optim.SGD", 1e-3, {"momentum": 0.9, "nesterov": True}),
        ("pytorch_optimizer:soap", "pytorch_optimizer.SOAP", 3e-3, {"betas": (0.95, 0.95)}),
        ("pytorch_optimizer:NAdam", "torch.optim.NAdam", 2e-3, {"momentum_decay": 4e-3}),
        ("heavyball:SOAP", "heavyball.SOAP", 3e-3, {}),
        ("heavyball:soap", "heavyball.SOAP", 3e-3, {}),
    ],
)
def test_a_short_name_means_a_class_and_its_defaults(
    name: str, implementation: str, rate: float, options: dict[str, Any]
) -> None:
    row = REGISTRY.find(name)
    assert (row.implementation, row.default_lr) == (implementation, rate)
    assert row.name.lower() == name.lower()
    optimizer = build_optimizer(nn.Linear(4, 4), name)
    assert type(optimizer) is row.load()
    assert optimizer.defaults.items() >= options.items()
    assert [group["name"] for group in optimizer.param_groups] == ["decay", "no_decay"]


@pytest.mark.usefixtures("collections")
def test_options_come_from_the_signature() -> None:
    optimizer = build_optimizer(nn.Linear(4, 4), "timm:lambc", lr=0.1, optim_args="max_grad_norm=0.5,trust_clip=false")
    assert optimizer.defaults.items() >= {"lr": 0.1, "max_grad_norm": 0.5, "trust_clip": False}.items()
    with pytest.raises(InvalidOption, match="'timm:lamb' has no option 'clip'"):
        OptimConfig("timm:lamb", optim_args={"clip": 1})


@pytest.mark.usefixtures("collections")
@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("timm:lam", ["timm has no optimizer 'lam'", "Close names: 'timm:lamb', 'timm:lambc'", "list 'timm:*'"]),
        ("timm:fusedlamb", ["no optimizer 'fusedlamb'", "'timm:lamb'"]),
        ("heavyball:SOAPBase", ["no optimizer 'SOAPBase'", "'heavyball:SOAP'"]),
        ("pytorch_optimizer:switched", ["between training and evaluation", "'schedule_free_adamw'"]),
        ("pytorch_optimizer:lookahead", ["'pytorch_optimizer:Lookahead'", "wraps another optimizer ('optimizer')"]),
        ("tim:lamb", ["'tim:lamb' is no short name", "'timm:', 'pytorch_optimizer:', 'heavyball:'"]),
    ],
)
def test_what_is_no_short_name_is_refused(name: str, parts: list[str]) -> None:
    with pytest.raises(UnknownOptimizer) as caught:
        OptimConfig(name)
    assert all(part in str(caught.value) for part in parts), caught.value
    assert name not in REGISTRY
    with pytest.raises(UnknownOptimizer):
        REGISTRY[name]


def test_a_missing_package_is_refused_with_its_command(path: pytest.MonkeyPatch) -> None:
    path.setattr(sys, "path", [entry for entry in sys.path if not (Path(entry) / "timm").is_dir()])
    path.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"'timm' is not installed: pip install --upgrade timm"):
        build_optimizer(nn.Linear(4, 4), "timm:lamb_layerwise")
    with pytest.raises(MissingDependency, match=r"pip install --upgrade pytorch-optimizer"):
        REGISTRY.find("pytorch_optimizer:soap")


@pytest.mark.parametrize(
    ("code", "helps"),
    [
        ("import package_of_nobody.ops", "No module named 'package_of_nobody'): pip install package_of_nobody"),
        ("raise RuntimeError('operator does not exist')", "operator does not exist): pip install --upgrade timm"),
        ("", "has no attribute 'list_optimizers'): pip install --upgrade timm"),
    ],
    ids=["lacks a package", "fails", "too old"],
)
def test_what_cannot_be_imported_says_what_is_missing(
    path: pytest.MonkeyPatch, tmp_path: Path, code: str, helps: str
) -> None:
    (tmp_path / "timm" / "optim").mkdir(parents=True)
    (tmp_path / "timm" / "__init__.py").write_text(code)
    (tmp_path / "timm" / "optim" / "__init__.py").write_text("")
    path.syspath_prepend(tmp_path)
    with pytest.raises(MissingDependency, match=r"'timm' is installed, but timm\.optim fails") as caught:
        REGISTRY.find("timm:lamb")
    assert helps in str(caught.value)


@pytest.mark.usefixtures("collections")
def test_layerwise_is_asked_for_by_the_suffix() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(IncompatibleTrainer, match="Lamb cannot be stepped layer by layer"):
        build_optimizer(module, "timm:lamb_layerwise")
    build_optimizer(module, "timm:lamb_layerwise", optim_args={"max_grad_norm": None})
    results = check_results("pytorch_optimizer:soap")
    assert results["layerwise"].status == results["resume"].status == "kept"


@pytest.mark.usefixtures("collections")
def test_it_trains_resumes_and_reads_what_the_dotted_path_wrote(tmp_path: Path) -> None:
    L.seed_everything(0)
    whole = LitTokens(optim="timm:lamb", lr=0.1)
    begin = copy.deepcopy(whole.state_dict())
    trainer(max_epochs=4).fit(whole, loader())
    first = LitTokens(optim="timm.optim.Lamb", lr=0.1)
    first.load_state_dict(begin)
    half = trainer(max_epochs=2)
    half.fit(first, loader())
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed = LitTokens(optim="timm:LAMB", lr=0.1)
    trainer(max_epochs=4).fit(resumed, loader(), ckpt_path=tmp_path / "half.ckpt")
    assert whole.losses[-1] < 0.9 * whole.losses[0]
    assert all(torch.equal(*pair) for pair in zip(whole.parameters(), resumed.parameters(), strict=True))


@pytest.mark.usefixtures("collections")
def test_what_a_class_leaves_out_of_its_file_is_not_missed() -> None:
    (result,) = held("heavyball:SOAP", {}, promises=["resume"])
    assert (result.status, result.text) == ("kept", "")


@pytest.mark.usefixtures("collections")
def test_a_part_and_the_command_line_take_it(tmp_path: Path) -> None:
    groups = {"model[.]head[.].*": {"optim": "heavyball:SOAP", "lr": 0.5}}
    optimizer = build_optimizer(LitTokens(optim="sgd"), "pytorch_optimizer:soap", param_groups=groups)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == [3e-3, 0.5]
    (tmp_path / "run.yaml").write_text("optim: timm:lambc\noptim_args: {max_grad_norm: null}\n")
    cli = OptimCLI(LitTokens, args=["--config", str(tmp_path / "run.yaml")], run=False)
    assert cli.model.optim_config.spec.name == "timm:lambc"


@pytest.mark.usefixtures("collections")
def test_a_checkpoint_alone_imports_no_collection(tmp_path: Path) -> None:
    run = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, barebones=False)
    run.strategy.connect(LitTokens(optim="pytorch_optimizer:soap"))
    run.save_checkpoint(tmp_path / "it.ckpt", weights_only=True)
    forget()
    loaded = LitTokens.load_from_checkpoint(tmp_path / "it.ckpt", weights_only=True)
    with pytest.raises(UntrustedOptimizer, match="whatever the module 'pytorch_optimizer' holds"):
        loaded.configure_optimizers()
    assert "pytorch_optimizer" not in sys.modules
    named = LitTokens.load_from_checkpoint(tmp_path / "it.ckpt", weights_only=True, optim="pytorch_optimizer:soap")
    assert named.optim_config.spec.implementation == "pytorch_optimizer.SOAP"


@pytest.mark.usefixtures("collections")
def test_list_imports_and_shows_a_collection_only_if_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "*"]) == main(["list", "sgd"]) == 0
    assert "timm:" not in capsys.readouterr().out
    assert not set(PACKAGES) & set(sys.modules)
    assert main(["list", "timm:*", "sgd"]) == 0
    out = capsys.readouterr().out
    assert "pytorch_optimizer" not in sys.modules
    assert re.search(r"^sgd ", out, re.MULTILINE)
    shown = re.findall(r"^timm:(\S+) +(\w+) +lr=", out, re.MULTILINE)
    assert shown == [("Kron", "Kron"), ("lamb", "Lamb"), ("lambc", "Lamb"), ("sgd", "SGD")]
    assert "trust_clip=True" in out
    assert main(["list", "pytorch_optimizer:*"]) == 0
    out = capsys.readouterr().out
    assert "summary" not in out
    assert re.search(r"switched +- +refused \(2\)", out)
    assert "2 of 4 can be used" in out
    assert main(["list", "timm:lmab*"]) == 2
    assert "Close names: 'timm:lamb'" in capsys.readouterr().err


@pytest.mark.usefixtures("collections")
def test_check_and_info_take_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "timm:[lk]amb,lr=0.01"]) == 0
    assert re.search(r"^timm:lamb,lr=0.01( +[+r.]){17}$", capsys.readouterr().out, re.MULTILINE)
    assert main(["info", "heavyball:soap"]) == 0
    assert capsys.readouterr().out.startswith("heavyball:soap (alias of heavyball:SOAP): SOAP of heavyball")


def test_torch_is_left_alone() -> None:
    """No identifier, alias or dotted path reads as a short name."""
    assert not [name for name in REGISTRY if ":" in name]
    assert REGISTRY.find("torch.optim.NAdam").load() is torch.optim.NAdam
