"""The ``lightning-optim`` command: in process where that is enough, as a real process where the process matters."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml

from lightning_optim import (
    REGISTRY,
    Buffer,
    InvalidParamGroups,
    OptimCLI,
    OptimizerSpec,
    OptimMixin,
    Options,
    StateLayout,
    build_optimizer,
    option,
)
from lightning_optim.command import _machine as machine
from lightning_optim.command import main
from lightning_optim.stepping import parts_of
from lightning_optim.table._availability import Requirement
from lightning_optim.table._options import describe, required
from tests.cases import CASES, ELSEWHERE, NAMES
from tests.processes import run_fresh

ALL = (*NAMES, *ELSEWHERE)
# Hugging Face's names for layerwise forms; the others are shown to who asks for them.
LAYERWISE = (
    *("galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise"),
    "apollo_adamw_layerwise",
)
LISTED = (*ALL, *LAYERWISE)

BROKEN = "known bug in its 8-bit optimizers"
UPGRADE = "pip install --upgrade 'bitsandbytes>=0.50'"
PROVIDERS = ("bitsandbytes", "torchao", "schedulefree", "optimi")
# Identifiers whose algorithm is ours and whose kernels are a package's.
USERS = {"bitsandbytes": {"galore_adamw_8bit"}}
DOTTED = "torch.optim.NAdam"


class Command:
    """Runs the command in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *argv: str, status: int = 0) -> str:
        """Returns stdout, or stderr for exit status 2."""
        assert main(argv) == status
        captured = self._capsys.readouterr()
        if status == 2:
            assert captured.out == ""
            return captured.err
        return captured.out

    def json(self, *argv: str, status: int = 0) -> Any:
        return strict_json(self(*argv, "--json", status=status))


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


def strict_json(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def install(folder: Path, name: str, version: str, entry_points: str = "") -> Path:
    """Puts a distribution that is nothing but metadata into ``folder``."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if entry_points:
        (info / "entry_points.txt").write_text(entry_points)
    return folder


def unwrapped(text: str) -> str:
    """Text without the line breaks that fit it into columns."""
    return " ".join(text.split())


def assert_fits(text: str) -> None:
    assert [line for line in text.splitlines() if len(line) > 100] == []


# list


def test_list_shows_every_identifier_with_its_summary_and_extra(command: Command) -> None:
    text = command("list")
    assert_fits(text)
    # Not the lines on which a summary goes on.
    shown = [line.split()[0] for line in text.splitlines() if line[:1].strip() and line.split()[0] in LISTED]
    assert [name for name in shown if name not in LAYERWISE] == list(REGISTRY.plain)
    assert set(shown) == set(LISTED)
    assert re.search(r"^lion_8bit +Lion, 8-bit block-wise quantized states +bitsandbytes +yes$", text, re.MULTILINE)
    assert re.search(r"^rmsprop +RMSprop +- +yes$", text, re.MULTILINE)
    assert f"{len(LISTED) - len(ELSEWHERE)} of {len(LISTED)} can run here" in text


def test_list_as_json(command: Command) -> None:
    entries = {entry["identifier"]: entry for entry in command.json("list")["optimizers"]}
    assert set(entries) == set(LISTED)
    assert {name for name, entry in entries.items() if not entry["available"]} == set(ELSEWHERE)
    assert entries["adamw_8bit"] == {
        "identifier": "adamw_8bit",
        "alias_of": "adamw_bnb_8bit",
        "summary": "AdamW, 8-bit block-wise quantized states",
        "implementation": "bitsandbytes.optim.AdamW",
        "extra": "bitsandbytes",
        "available": True,
        "problems": [],
    }
    assert entries["adamw_torch"]["alias_of"] is None
    assert entries["adamw_torch"]["extra"] is None


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["*8bit*"], {name for name in LISTED if "8bit" in name}),
        (["lion_?bit", "sgd"], {"lion_8bit", "sgd"}),
        (["adamw_torch"], {"adamw_torch"}),
        (["*_bnb*", "rmsprop*"], {name for name in NAMES if "_bnb" in name or name.startswith("rmsprop")}),
    ],
)
def test_list_takes_wildcards(command: Command, patterns: list[str], expected: set[str]) -> None:
    names = [entry["identifier"] for entry in command.json("list", *patterns)["optimizers"]]
    assert len(names) == len(set(names)) == len(expected)
    assert set(names) == expected


@pytest.mark.parametrize(("pattern", "close"), [("adam", "adamw_torch"), ("*9bit*", "lion_8bit"), ("lyon*", "lion")])
def test_list_of_nothing_names_what_comes_close(command: Command, pattern: str, close: str) -> None:
    error = command("list", "sgd", pattern, status=2)
    assert repr(pattern) in error
    assert close in error.partition("Close names:")[2]


def test_list_tells_each_reason_once_with_the_command_to_type(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Requirement, "installed_version", lambda self: None)
    text = command("list")
    for distribution in ("bitsandbytes", "torchao", "schedulefree", "torch-optimi"):
        # One line, whole: it is there to be copied.
        assert len(re.findall(rf"^.*pip install --upgrade '{distribution}>=[\d.]+'$", text, re.MULTILINE)) == 1
    available = {line.split()[0] for line in text.splitlines() if line.endswith(" yes")}
    ours = {case.name for case in CASES if case.upstream.startswith(("torch.", "lightning_optim.optimizers:"))}
    ours -= USERS["bitsandbytes"]
    ours |= {name for name in LAYERWISE if name.removesuffix("_layerwise") in ours}
    assert available == ours
    assert f"{len(ours)} of {len(LISTED)} can run here" in text


def test_list_looks_for_a_device_that_the_row_runs_on(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "device_types", lambda: frozenset({"mps"}))
    entries = {entry["identifier"]: entry for entry in command.json("list")["optimizers"]}
    assert {name for name, entry in entries.items() if not entry["available"]} == {
        name for name in LISTED if REGISTRY[name].devices is not None and "mps" not in (REGISTRY[name].devices or ())
    }
    assert len(entries["adamw_torch_xla"]["problems"]) == 1, "the package that is missing brings the device"
    assert "runs on cpu, cuda, xpu, and torch finds only mps here" in entries["lion_8bit"]["problems"][0]


def test_compiled_rows_need_a_compiler_on_a_cpu(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler")
    monkeypatch.setattr(machine, "device_types", lambda: frozenset({"cpu"}))
    entries = command.json("list")["optimizers"]
    unavailable = {e["identifier"]: e["problems"] for e in entries if not e["available"]}
    assert set(unavailable) == {"adamw_torch_4bit", "adamw_torch_8bit", "adamw_torch_fp8", *ELSEWHERE}
    assert "/no/such/compiler" in unavailable["adamw_torch_4bit"][0]
    diagnosis = command.json("doctor", status=1)
    assert diagnosis["compiler"]["path"] is None
    assert set(diagnosis["unavailable"]) == {"adamw_torch_4bit", "adamw_torch_8bit", "adamw_torch_fp8"}
    monkeypatch.setattr(machine, "device_types", lambda: frozenset({"cpu", "cuda"}))
    entries = command.json("list")["optimizers"]
    assert {entry["identifier"] for entry in entries if not entry["available"]} == set(ELSEWHERE)


# info


@pytest.mark.parametrize("name", [*NAMES, DOTTED])
def test_info_mentions_everything(command: Command, name: str) -> None:
    spec = REGISTRY.find(name)
    text = command("info", name)
    assert_fits(text)
    infos = describe(spec.options)
    for info in infos:
        line = next(line for line in text.splitlines() if line.startswith(f"  {info.name} "))
        assert info.type in line or ("one of" in line and info.type in unwrapped(text))
        assert repr(info.default) in line
        assert info.range in line
        assert ("per group" in line) == (info.scope == "group")
        assert info.help in unwrapped(text)
    for part in (spec.summary, spec.implementation, spec.source, spec.note, *spec.aliases):
        assert part in unwrapped(text)
    for requirement in spec.requirements:
        assert requirement.install_command in text
    assert re.search(rf"^  lr +{spec.default_lr!r} by default$", text, re.MULTILINE)
    assert re.search(rf"^  weight_decay +{spec.default_weight_decay!r} by default$", text, re.MULTILINE)
    assert ("averaged weights" in text) == spec.averages_weights
    assert ("stay in 32 bits" in unwrapped(text)) == (spec.bits is not None)


@pytest.mark.parametrize("name", [*NAMES, DOTTED])
def test_info_as_json(command: Command, name: str) -> None:
    spec = REGISTRY.find(name)
    info = command.json("info", name)
    assert info["identifier"] == name
    assert info["alias_of"] == (None if name == spec.name else spec.name)
    assert (info["lr"], info["weight_decay"]) == (spec.default_lr, spec.default_weight_decay)
    assert info["fixed"] == dict(spec.fixed)
    for shown, declared in zip(info["options"], describe(spec.options), strict=True):
        assert (shown["name"], shown["scope"], shown["required"]) == (declared.name, declared.scope, False)
        assert shown["default"] == json.loads(json.dumps(declared.default))
    assert (info["state"] is None) == (name == DOTTED)


def test_what_info_says_of_param_groups_is_what_they_take(command: Command) -> None:
    for name in NAMES:
        told = command.json("info", name)["grouping"]["param_groups_keys"]
        with pytest.raises(InvalidParamGroups) as raised:
            build_optimizer(torch.nn.Linear(2, 2), name, param_groups={".*": {"nonsense": 1}})
        allowed = re.findall(r"'(\w+)'", str(raised.value).partition("allowed: ")[2])
        assert told == allowed, name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sgd", 0),
        ("adamw_torch", 2 * 2**22 + 4),
        ("lion_8bit", 2**20 + 2**20 // 256 * 4),
        ("ademamix", 3 * 2**22),
        ("schedule_free_sgd", 2**22),
    ],
)
def test_info_counts_state_bytes(command: Command, name: str, expected: int) -> None:
    state = command.json("info", name)["state"]
    assert state["parameter"] == "1024x1024 float32"
    assert state["bytes"] == expected
    assert state["bytes_per_element"] == expected / 2**20
    assert f"{expected:,} bytes for a parameter of 1024x1024 float32" in command("info", name)


def test_info_tells_buffers_that_an_option_brings(command: Command) -> None:
    buffers = {
        buffer["name"]: buffer["by_default"] for buffer in command.json("info", "adamw_torch")["state"]["buffers"]
    }
    assert buffers == {"exp_avg": True, "exp_avg_sq": True, "max_exp_avg_sq": False}


@pytest.mark.parametrize("name", [*NAMES, DOTTED])
def test_the_python_example_runs(command: Command, name: str) -> None:
    code = command.json("info", name)["example"]["python"]
    assert unwrapped(code) in unwrapped(command("info", name))
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    optimizer, spec = namespace["optimizer"], REGISTRY.find(name)
    assert type(parts_of(optimizer)[0]) is spec.load()
    decayed = "decay/low_rank" if spec.projects else "decay"
    # The others of an optimizer for hidden matrices are a part of their own.
    others = "adamw/" if spec.takes != "all" else ""
    assert [group["name"] for group in optimizer.param_groups] == [decayed, f"{others}no_decay"]
    for group in optimizer.param_groups:
        assert float(group["lr"]) == pytest.approx(spec.default_lr)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [spec.default_weight_decay, 0.0]


OF_PARTS = """
model:
  class_path: parts_lit.Lit
  init_args:
    width: 8
    optim: muon
    lr: 0.02
    param_groups: {"net[.]0[.].*": {optim: lion_8bit, lr: 1.0e-4}}
"""
PARTS_LIT = """
import lightning as L
from torch import nn
from lightning_optim import OptimMixin

class Lit(OptimMixin, L.LightningModule):
    def __init__(self, width: int, **optim):
        super().__init__(**optim)
        self.net = nn.Sequential(nn.Embedding(4, width), nn.Linear(width, width), nn.Linear(width, 4))

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()
"""


def test_info_shows_how_a_request_is_divided(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("parts_lit.py").write_text(PARTS_LIT)
    Path("run.yaml").write_text(OF_PARTS)
    info = command.json("info", "--config", "run.yaml")
    assert (info["identifier"], info["model"]) == ("muon", "Lit")
    assert "'net.2.weight' is taken for the output layer" in info["parts"][0]["remark"]
    assert [(each["identifier"], each["takes"], each["lr"]) for each in info["parts"]] == [
        ("muon", "hidden matrices", 0.02),
        ("adamw", "all other parameters", 1e-3),
        ("lion_8bit", "what 'net[.]0[.].*' matches", 1e-4),
    ]
    # As the optimizer itself is divided.
    sys.path.insert(0, str(tmp_path))
    built = importlib.import_module("parts_lit").Lit(**yaml.safe_load(OF_PARTS)["model"]["init_args"])
    groups = built.configure_optimizers().param_groups
    shown = [(each["name"], one["tensors"], one["lr"]) for each in info["parts"] for one in each["groups"].values()]
    assert shown == [(group["part"], len(group["params"]), group["lr"]) for group in groups]
    text = command("info", "--config", "run.yaml")
    assert_fits(text)
    assert "lion_8bit for what 'net[.]0[.].*' matches: bitsandbytes.optim.Lion (lr=0.0001," in text
    # The memory of the same request: Lion keeps 4 bytes for each element of the table, which 32 bits are.
    asked = ("memory", "--config", "run.yaml", "--input", "2x3:int64")
    (estimate,) = command.json(*asked)["estimates"]
    (less,) = command.json(*asked, "--param-groups", "{'net[.]0[.].*': {optim: sgd}}")["estimates"]
    assert estimate["state"] - less["state"] == 4 * 4 * 8


def test_info_says_the_parts_of_a_name_and_of_patterns(command: Command) -> None:
    muon = "  muon for hidden matrices: lightning_optim.optimizers.Muon (lr=0.001, weight_decay=0.1)"
    adamw = "  adamw for all other parameters: torch.optim.AdamW (lr=0.001, weight_decay=0.01)"
    assert "\n".join(("Parts", muon, adamw, "")) in command("info", "muon")
    assert command.json("info", "sgd")["parts"] is None
    gpt2 = command("info", "muon", "--model", "gpt2")
    assert re.search(r"^Parts of gpt2$", gpt2, re.MULTILINE)
    assert re.search(r"^    decay +72 tensors +84,934,656 elements +lr=0.001$", gpt2, re.MULTILINE)
    for words, told in (
        ((), "no optimizer given: name one"),
        (("sgd", "--param-groups", "{'a.*': {optim: adamw_8bti}}"), "Close names: 'adamw_8bit'"),
        (("sgd", "--param-groups", "{'a.*': {optim: sgd}}", "--model", "gpt2"), "matches no trainable parameter"),
        (("sgd", "--param-groups", "{'a.*'"), "--param-groups \"{'a.*'\": "),
        (("--optim-args", "momentum=0.9"), "--optim-args without --optim"),
    ):
        assert told in unwrapped(command("info", *words, status=2))


class LitLinear(OptimMixin, L.LightningModule):
    def __init__(self, **optim: Any) -> None:
        super().__init__(**optim)
        self.layer = torch.nn.Linear(64, 64)


@pytest.mark.parametrize("name", [*NAMES, DOTTED])
def test_the_command_line_example_runs(command: Command, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    example = command.json("info", name)["example"]["command_line"]
    shown = command("info", name).replace("\\\n", "")
    assert example in unwrapped(shown)
    program, script, subcommand, *words = shlex.split(example)
    assert (program, script, subcommand) == ("python", "train.py", "fit")
    monkeypatch.setattr(sys, "argv", ["train.py"])
    cli = OptimCLI(LitLinear, args=words, run=False, save_config_callback=None)
    optimizer = cli.model.configure_optimizers()
    assert type(parts_of(optimizer)[0]) is REGISTRY.find(name).load()
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(REGISTRY.find(name).default_lr)


def test_info_shows_what_an_aliased_row_needs(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Requirement, "installed_version", lambda self: None)
    text = command("info", "adamw_8bit")
    assert text.startswith("adamw_8bit (alias of adamw_bnb_8bit): AdamW, 8-bit")
    assert "needs         bitsandbytes>=0.50, installed: no" in text
    assert "the package 'bitsandbytes' is not installed" in text
    assert "extra         bitsandbytes (of lightning-optim)" in text
    assert "runs here     no:" in text


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("adamw_8bti", "Close names: 'adamw_8bit'"),
        ("torch.optim.NAdamm", "cannot be imported"),
        ("torch.nn.Linear", "is no subclass of torch.optim.Optimizer"),
        ("no_such_package.SOAP", "no package 'no_such_package' is installed"),
    ],
)
def test_info_of_nothing(command: Command, name: str, told: str) -> None:
    error = command("info", name, status=2)
    assert repr(name) in error
    assert told in error


@dataclass(frozen=True)
class AwkwardOptions(Options):
    rank: int = required("must be given")
    bound: float = option(float("inf"), "a default that JSON does not know")


def test_info_of_a_row_without_defaults(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = OptimizerSpec(
        name="awkward",
        target="torch.optim:SGD",
        summary="takes no weight decay",
        source="this test",
        options=AwkwardOptions,
        default_lr=None,
        default_weight_decay=0.0,
        state=StateLayout(buffers=(Buffer("momentum"), Buffer("sketch", when=lambda options: options.rank > 1))),
        requirements=(Requirement("no-such-one", "no_such_one"), Requirement("no-such-two", "no_such_two", ">=2")),
        decays=False,
        warmup="none",
    )
    monkeypatch.setitem(REGISTRY._specs, "awkward", spec)
    info = command.json("info", "awkward")
    assert (info["lr"], info["weight_decay"]) == (None, None)
    rank, bound = info["options"]
    assert (rank["required"], rank["default"]) == (True, None)
    assert (bound["required"], bound["default"]) == (False, "inf")
    assert info["state"]["bytes"] is None
    assert "weight_decay" not in info["grouping"]["param_groups_keys"]
    assert 'optim_args={"rank": ...}' in info["example"]["python"]
    ast.parse(info["example"]["python"])
    text = command("info", "awkward")
    assert "must be given" in text
    assert "takes none" in text
    assert "warmup_steps is refused" in text
    for package in ("no-such-one", "no-such-two>=2"):
        # As a fact of its own, and as the end of the reason.
        assert len(re.findall(rf"pip install --upgrade '{package}'$", text, re.MULTILINE)) == 2


# doctor


def test_doctor_of_a_whole_installation(command: Command) -> None:
    diagnosis = command.json("doctor")
    assert diagnosis["ok"] is True
    assert diagnosis["versions"]["torch"] == torch.__version__
    assert diagnosis["versions"]["lightning"] == L.__version__
    assert diagnosis["devices"][0]["type"] == "cpu"
    users = {package["module"]: package["identifiers"] for package in diagnosis["packages"]}
    assert set(users) == {*PROVIDERS, *ELSEWHERE.values()}
    # The reference's package is the one that the case names: a second source for what the rows require.
    for module in PROVIDERS:
        names = users[module]
        assert set(names) == {case.name for case in CASES if case.upstream.startswith(module)} | USERS.get(
            module, set()
        )
    text = command("doctor")
    assert_fits(text)
    others = "adamw_torch_xla, adamw_torch_npu_fused, adamw_apex_fused, flash_adamw, flash_lion"
    assert f"{len(ELSEWHERE)} of {len(ALL)} identifiers are for other devices: {others}." in unwrapped(text)
    assert text.count("for other devices only: ") == len(set(ELSEWHERE.values()))
    assert "problem: " not in text
    assert set(diagnosis["elsewhere"]) == set(ELSEWHERE)
    assert text.endswith(f"All {len(NAMES)} others can run here.\n")
    assert "have to come from the same of them" in unwrapped(text)


def test_doctor_names_accelerators(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU number {index}")
    # Without apex, which is for CUDA.
    assert command.json("doctor", status=1)["devices"][1:] == [
        {"type": "cuda", "index": 0, "name": "GPU number 0", "verified": None},
        {"type": "cuda", "index": 1, "name": "GPU number 1", "verified": None},
    ]
    assert re.search(r"  cuda:1  GPU number 1 +not verified", command("doctor", status=1))


def test_doctor_and_the_page_agree_on_what_ran_where(command: Command) -> None:
    page = (Path(__file__).parents[2] / "docs" / "hardware.md").read_text(encoding="utf-8").partition("## Versions")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:]] for line in page.splitlines() if line.startswith("| ")]
    # "CUDA with apex" is no device of its own.
    rows = [row for row in rows if row[0].isupper() or row[0].replace(", ", "").isupper()]
    ran = {device.lower(): row[2] != "nothing yet" for row in rows for device in row[0].split(", ")}
    assert len(ran) == 6
    diagnosis = command.json("doctor")
    assert {name for name, found in ran.items() if not found} == set(diagnosis["not_verified"])
    assert all(device["verified"] for device in diagnosis["devices"] if ran[device["type"]])


def test_a_broken_version_is_named(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(install(tmp_path, "bitsandbytes", "0.40.0"))
    for text in (command("list"), command("info", "adamw_8bit"), command("doctor", status=1)):
        assert f"bitsandbytes 0.40.0 has a {BROKEN}" in unwrapped(text)
        assert UPGRADE in text
    diagnosis = command.json("doctor", status=1)
    users = {case.name for case in CASES if case.upstream.startswith("bitsandbytes")} | USERS["bitsandbytes"]
    assert set(diagnosis["unavailable"]) == users
    failing = {package["module"] for package in diagnosis["packages"] if not package["ok"]}
    assert failing == {"bitsandbytes", *ELSEWHERE.values()}
    assert diagnosis["compiler"]["path"] is not None


def test_a_package_for_a_newer_torch_is_named(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(install(tmp_path, "torch", "2.9.0"))
    for text in (command("list"), command("info", "adamw_torch_8bit"), command("doctor", status=1)):
        assert "torchao 0.18.0 needs torch>=2.10, and 2.9.0 is installed" in unwrapped(text)
        assert "pip install 'lightning-optim[torchao]'" in text
    assert set(command.json("doctor", status=1)["unavailable"]) == {
        "adamw_torch_4bit",
        "adamw_torch_8bit",
        "adamw_torch_fp8",
    }


def test_a_broken_plugin_stops_list_but_not_doctor(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(tmp_path, "bad_plugin", "1.0", "[lightning_optim.optimizers]\nbad = no_such_module:ROWS\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(REGISTRY, "_plugins_loaded", False)
    for argv in (["list"], ["info", "sgd"]):
        assert main(argv) == 1
        assert "the plugin 'no_such_module:ROWS'" in capsys.readouterr().err
    diagnosis = command.json("doctor", status=1)
    assert diagnosis["plugins"] == [{"name": "bad", "value": "no_such_module:ROWS", "distribution": "bad_plugin"}]
    assert "no_such_module" in diagnosis["plugin_problem"]
    assert diagnosis["count"] == len(ALL)
    assert "the plugin 'no_such_module:ROWS'" in unwrapped(command("doctor", status=1))


# The command as a process


@pytest.mark.parametrize("argv", [[], ["lst"], ["list", "--jsn"]])
def test_wrong_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(argv)
    assert raised.value.code == 2
    assert "usage: lightning-optim" in capsys.readouterr().err


def test_the_module_prints_nothing_but_json() -> None:
    done = run_fresh("-m", "lightning_optim", "list", "--json")
    assert done.returncode == 0, done.stderr
    assert {entry["identifier"] for entry in strict_json(done.stdout)["optimizers"]} == set(LISTED)


def test_a_reader_that_has_had_enough_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "lightning_optim", "explain"]
    with open(writing, "wb") as closed:
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_module_exits_with_the_status(tmp_path: Path) -> None:
    done = run_fresh("-m", "lightning_optim", "doctor", path=install(tmp_path, "bitsandbytes", "0.40.0"))
    assert done.returncode == 1, done.stderr
    assert BROKEN in unwrapped(done.stdout)
    assert UPGRADE in done.stdout


def test_no_optional_package_is_imported() -> None:
    code = (
        "import sys; from lightning_optim.command import main; main(['list']); main(['doctor']); "
        "main(['info', 'adamw_8bit', '--json']); "
        f"print([name for name in {(*PROVIDERS, 'pytorch_lightning', 'jsonargparse')} if name in sys.modules])"
    )
    done = run_fresh("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


# memory


def test_memory_tells_one_identifier_in_detail(command: Command) -> None:
    text = command("memory", "--llama", "60m", "--optim", "adamw_8bit_layerwise", "--batch", "2", "--length", "64")
    assert_fits(text)
    assert text.startswith("llama-60m, bf16-true, cuda: memory of one device, from the second step on")
    assert re.search(r"^ +parameters +110\.7\d MiB +110\.7\d MiB$", text, re.MULTILINE)
    assert re.search(r"^ +peak +\d+\.\d\d MiB +in (forward|backward|the step)$", text, re.MULTILINE)


def test_memory_of_shards(command: Command) -> None:
    shape = ("--hidden", "64", "--layers", "1", "--heads", "4", "--intermediate", "96", "--vocab", "128")
    shards = ("--batch", "1", "--length", "8", "--strategy", "fsdp2", "--devices", "2")
    text = command("memory", *shape, *shards, "--optim", "sgd")
    assert "memory of each of 2 devices (fsdp2)" in text
    assert "communication" in text
    assert "Use optim='adamw_torch'" in unwrapped(command("memory", *shape, *shards, "--optim", "adam_mini", status=2))


def test_memory_compares_all_filters_and_draws(command: Command, tmp_path: Path) -> None:
    picture = tmp_path / "memory.svg"
    shape = (
        "--hidden",
        "64",
        "--layers",
        "1",
        "--heads",
        "2",
        "--intermediate",
        "96",
        "--vocab",
        "100",
        "--batch",
        "0",
    )
    report = command.json("memory", *shape, "--fits", "0.3MiB", "--picture", str(picture))
    peaks = [entry["peak"] for entry in report["estimates"]]
    assert 10 < len(peaks) < 60
    assert peaks == sorted(peaks)
    assert all(entry["peak"] - entry["pageable"] <= report["fits"] for entry in report["estimates"])
    drawn = picture.read_text()
    assert all(f">{entry['optim']}</text>" in drawn for entry in report["estimates"])
    error = command("memory", *shape, "--optim", "sgd", "--fits", "1KiB", status=2)
    assert "nothing fits into 1KiB: 'sgd' needs" in error


LIT = """
import lightning as L
import torch

class Lit(L.LightningModule):
    def __init__(self, width: int = 8):
        super().__init__()
        self.layer = torch.nn.Linear(width, width)

    def training_step(self, batch, batch_idx):
        return self.layer(batch["inputs"]).square().mean()

class Loads(Lit):
    def __init__(self, width: int = 8):
        super().__init__()
        self.layer.weight.data.sum().item()
"""
CONFIG = """
optim: sgd
optim_args: {momentum: 0.9}
trainer: {precision: bf16-true, accumulate_grad_batches: 4, devices: auto}
model: {class_path: memory_lit.Lit, init_args: {width: 32}}
"""


def test_memory_takes_a_module_and_a_config(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("memory_lit.py").write_text(LIT)
    Path("run.yaml").write_text(CONFIG)
    batch = ("--input", "inputs=4x32")
    (typed,) = command.json(
        *("memory", "memory_lit:Lit", "--init-args", "width=32", *batch, "--precision", "bf16-true", "--optim", "sgd"),
        *("--optim-args", "momentum=0.9", "--accumulate", "4"),
    )["estimates"]
    (read,) = command.json("memory", "--config", "run.yaml", *batch)["estimates"]
    assert typed == read
    assert (read["parameters"], read["state"]) == (2 * (32 * 32 + 32), 2 * (32 * 32 + 32))
    # A strategy with options stands there by its class.
    words, theirs = ("memory", "--config", "run.yaml", *batch), "lightning.pytorch.strategies.ModelParallelStrategy"
    for strategy in (
        f"{{class_path: {theirs}, init_args: {{data_parallel_size: 2}}}}",
        "{class_path: lightning_optim.FSDP2Strategy, init_args: {shard: nothing}}",
    ):
        Path("run.yaml").write_text(CONFIG.replace("devices: auto", f"devices: 2, strategy: {strategy}"))
        assert "Lit" in command(*words, status=2), "nothing says which module to shard"
        (shards,) = command.json(*words, "--shard", "layer")["estimates"]
        assert (shards["strategy"], 2 * shards["parameters"]) == ("fsdp2", read["parameters"])
    assert "memory_lit.Loads() could not be made on the meta device" in command("memory", "memory_lit.Loads", status=2)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((), "no model given: name one, as in `lightning-optim memory --llama 7b`"),
        (("gpt2", "--llama", "7b"), "2 models given"),
        (("llama-8b",), "no shape 'llama-8b'"),
        (("no_such_module:Lit",), "there is no no_such_module:Lit"),
        (("--hidden", "64"), "a shape of your own needs --layers, --heads, --intermediate, --vocab, too"),
        (("gpt2", "--fits", "much"), "--fits 'much' is not a size: give one such as 24GiB, 24GB"),
        (("gpt2", "--optim-args", "rank=8"), "--optim-args without --optim"),
        (("gpt2", "--input", "8x8"), "--input is for a module"),
        (("torch.nn.Linear", "--init-args", "8"), "--init-args '8' is no name=value"),
        (("torch.nn.Identity", "--batch", "8"), "--batch and --length are for shapes"),
        (("torch.nn.Identity", "--input", "8y8"), "--input '8y8' is no shape such as 8x2048:int64"),
        (("--config", "no.yaml"), "--config no.yaml: "),
        (("gpt2", "--optim", "adamwe"), "adamwe"),
    ],
)
def test_memory_says_what_is_wrong_with_a_request(command: Command, words: tuple[str, ...], text: str) -> None:
    assert text in unwrapped(command("memory", *words, status=2))
