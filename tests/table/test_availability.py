"""Whether packages can be used, from metadata alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from torch import nn

from lightning_optim import REGISTRY, MissingDependency, OptimConfig, Requirement, build_optimizer
from lightning_optim.table._availability import check, ensure
from tests.cases import ELSEWHERE, NAMES
from tests.models import LitTokens, loader, trainer
from tests.processes import run_fresh

PACKAGES = {"bitsandbytes": "adamw_bnb_8bit", "torchao": "adamw_torch_8bit", "torch-optimi": "stable_adamw"}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that comes first on the path, as another environment's site-packages would."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def install(site: Path, distribution: str, version: str) -> None:
    """Writes the metadata that pip writes."""
    metadata = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")


@pytest.mark.parametrize("name", NAMES)
def test_every_row_can_be_built_here(name: str) -> None:
    availability = REGISTRY[name].availability()
    assert availability
    assert availability.reasons == ()
    ensure(name, REGISTRY[name].requirements)


@pytest.mark.parametrize("version", ["0.40.0", "0.41.0"])
def test_bitsandbytes_with_the_known_bug_is_refused(site: Path, version: str) -> None:
    install(site, "bitsandbytes", version)
    with pytest.raises(MissingDependency) as caught:
        build_optimizer(nn.Linear(2, 2), "lion_8bit")
    assert caught.value.text == (
        f"optim='lion_8bit' cannot run here: bitsandbytes {version} has a known bug in its 8-bit optimizers (they "
        "diverge): pip install --upgrade 'bitsandbytes>=0.50'"
    )


@pytest.mark.parametrize(
    ("distribution", "version", "needed"),
    [
        ("bitsandbytes", "0.41.1", ">=0.50"),
        ("bitsandbytes", "0.49.2", ">=0.50"),
        ("torchao", "0.17.0", ">=0.18"),
        ("torch-optimi", "0.3.2", ">=0.3.3"),
    ],
)
def test_old_versions_are_refused(site: Path, distribution: str, version: str, needed: str) -> None:
    install(site, distribution, version)
    name = PACKAGES[distribution]
    assert not REGISTRY[name].availability()
    with pytest.raises(MissingDependency) as caught:
        build_optimizer(nn.Linear(2, 2), name)
    nearest = [other for other in REGISTRY[name].fallbacks if REGISTRY[other].availability()][:1]
    assert caught.value.text == (
        f"optim={name!r} cannot run here: {distribution} {version} is installed, {needed} is needed: "
        f"pip install --upgrade '{distribution}{needed}'"
        + "".join(f". Or use optim={other!r} (optim_fallback=True does so by itself)" for other in nearest)
    )


@pytest.mark.parametrize("version", ["0.50.0", "0.51.0.dev3", "1.0+cu128"])
def test_new_versions_are_accepted(site: Path, version: str) -> None:
    install(site, "bitsandbytes", version)
    assert REGISTRY["adamw_8bit"].availability()


def test_an_absent_package_is_refused_with_the_command() -> None:
    requirement = Requirement("no-such-distribution", "no_such_module", ">=2")
    assert requirement.installed_version() is None
    with pytest.raises(MissingDependency) as caught:
        ensure("some_name", (requirement,))
    assert caught.value.text == (
        "optim='some_name' cannot run here: the package 'no-such-distribution' is not installed: "
        "pip install --upgrade 'no-such-distribution>=2'"
    )


def test_a_distribution_without_its_module_is_a_broken_installation(site: Path) -> None:
    install(site, "half-installed", "2.1")
    requirement = Requirement("half-installed", "half_installed", ">=2")
    problem = requirement.problem()
    assert problem is not None
    assert "half-installed 2.1 is installed but has no module 'half_installed'" in problem
    assert problem.endswith("pip install --upgrade 'half-installed>=2' --force-reinstall")
    (site / "half_installed.py").write_text("raise RuntimeError('checking must not import')\n")
    assert requirement.problem() is None
    assert "half_installed" not in sys.modules


def test_a_package_built_against_another_torch_is_refused(site: Path) -> None:
    install(site, "follower", "2.9.0")
    (site / "follower.py").write_text("")
    install(site, "leader", "2.13.0")
    requirement = Requirement("follower", "follower", ">=2", same_minor_as="leader", command="pip install both")
    assert requirement.problem() == (
        "follower 2.9.0 needs leader of the same version, and 2.13.0 is installed: pip install both"
    )
    install(site, "twin", "2.9.3")
    assert Requirement("follower", "follower", same_minor_as="twin").problem() is None


@pytest.mark.parametrize("version", ["2.9.0", "2.9.1+cu128", "2.9.0a0+nv25.8"])
@pytest.mark.parametrize("name", ["adamw_torch_4bit", "adamw_torch_8bit", "adamw_torch_fp8"])
def test_torchao_is_refused_with_a_torch_that_it_cannot_be_imported_with(site: Path, name: str, version: str) -> None:
    install(site, "torch", version)
    install(site, "torchao", "0.18.0")
    problem = f"torchao 0.18.0 needs torch>=2.10, and {version} is installed: pip install 'lightning-optim[torchao]'"
    assert REGISTRY[name].availability().reasons == (problem,)
    with pytest.raises(MissingDependency) as caught:
        build_optimizer(nn.Linear(2, 2), name)
    assert str(caught.value).startswith(f"optim={name!r} cannot run here: {problem}. Or use optim='adamw_bnb_8bit'")
    model = LitTokens(optim=name)
    with pytest.raises(MissingDependency, match="pip install 'lightning-optim"):
        trainer(max_steps=1).fit(model, loader())
    assert model.losses == []


@pytest.mark.parametrize("version", ["2.10.0", "2.10.0a0+nv25.10", "2.13.0+cpu", "2.14.0.dev20261120"])
def test_torchao_is_accepted_with_newer_versions(site: Path, version: str) -> None:
    install(site, "torch", version)
    assert REGISTRY["adamw_torch_8bit"].availability()


def test_the_command_for_an_old_torch_brings_a_new_one_whatever_else_is_missing(site: Path) -> None:
    """The newest torchao alone would be refused next."""
    install(site, "torch", "2.9.0")
    install(site, "torchao", "0.17.0")
    assert REGISTRY["adamw_torch_8bit"].availability().reasons == (
        "torchao 0.17.0 is installed, >=0.18 is needed: pip install 'lightning-optim[torchao]'",
    )


def test_all_reasons_are_given(site: Path) -> None:
    install(site, "outdated", "1.0")
    absent, outdated = Requirement("absent-one", "absent_one"), Requirement("outdated", "sys", ">=2")
    availability = check((absent, outdated, Requirement("torch", "torch", ">=2")))
    assert not availability
    assert [reason.split(":")[0] for reason in availability.reasons] == [
        "the package 'absent-one' is not installed",
        "outdated 1.0 is installed, >=2 is needed",
    ]


def test_a_missing_package_stops_fit_but_not_the_request(site: Path) -> None:
    install(site, "bitsandbytes", "0.40.0")
    model = LitTokens(optim="lion_8bit", optim_args="betas=(0.8, 0.9)")
    assert OptimConfig("lion_8bit").optim == "lion_8bit"
    with pytest.raises(MissingDependency, match="known bug"):
        trainer(max_steps=1).fit(model, loader())
    assert model.losses == []


def test_checking_and_requesting_import_nothing() -> None:
    code = (
        "import json, sys\n"
        "from lightning_optim import REGISTRY, OptimConfig\n"
        "before = set(sys.modules)\n"
        "available = [name for name in REGISTRY.plain if REGISTRY[name].availability()]\n"
        "requests = [OptimConfig(name, lr=1e-3, optim_args={}) for name in REGISTRY.plain]\n"
        "print(json.dumps([len(available), sorted(set(sys.modules) - before)]))"
    )
    done = run_fresh("-c", code)
    assert done.returncode == 0, done.stderr
    available, imported = json.loads(done.stdout)
    assert available == len(NAMES)
    optional = {requirement.module for spec in REGISTRY.plain.values() for requirement in spec.requirements}
    assert optional == {"bitsandbytes", "torchao", "optimi", "schedulefree", *ELSEWHERE.values()}
    assert not [module for module in imported if module.partition(".")[0] in optional | {"lightning_optim"}]
