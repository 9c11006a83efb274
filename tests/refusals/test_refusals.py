"""Every error of ours carries a code, every code has an entry, and a code keeps its meaning."""

from __future__ import annotations

import ast
import copy
import dataclasses
import inspect
import json
import pickle
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_optim
from lightning_optim import IncompatibleTrainer, InvalidOption, MissingDependency, UnknownOptimizer, errors
from lightning_optim.command import main
from lightning_optim.command._explain import as_text
from lightning_optim.errors import Refused, joined, said
from lightning_optim.refusals import ENTRIES, SECTIONS

PACKAGE = Path(lightning_optim.__file__).parent
DOCS = PACKAGE.parent / "docs"
CLASSES = {name: cls for name, cls in vars(errors).items() if inspect.isclass(cls) and issubclass(cls, Refused)}
del CLASSES["Refused"]
CODE = re.compile(r"LO[1-9]\d\d")

#: Every code that was ever given, with its name: none is taken out, and none means something else later.
GIVEN = {
    "LO101": "unknown-optimizer",
    "LO102": "not-a-name",
    "LO103": "not-an-optimizer-class",
    "LO104": "unfit-constructor",
    "LO105": "takes-model-or-optimizer",
    "LO106": "unknown-modes",
    "LO107": "missing-package",
    "LO108": "unknown-schedule",
    "LO109": "name-taken",
    "LO110": "untrusted-optimizer",
    "LO200": "invalid-option",
    "LO201": "unknown-option",
    "LO202": "missing-option",
    "LO203": "wrong-type",
    "LO204": "out-of-range",
    "LO205": "unreadable-string",
    "LO206": "given-twice",
    "LO207": "unknown-choice",
    "LO208": "options-do-not-agree",
    "LO209": "invalid-warmup",
    "LO210": "unknown-length",
    "LO211": "no-warmup-here",
    "LO212": "no-module-schedule",
    "LO213": "end-above-peak",
    "LO215": "rounds-to-zero",
    "LO216": "needs-whole-matrices",
    "LO217": "bitsandbytes-overrides",
    "LO300": "invalid-groups",
    "LO301": "groups-no-mapping",
    "LO302": "pattern-matches-nothing",
    "LO303": "no-regular-expression",
    "LO304": "not-per-group",
    "LO306": "nothing-to-train",
    "LO307": "lazy-parameter",
    "LO308": "not-parameters",
    "LO309": "layer-pattern",
    "LO310": "no-layers",
    "LO311": "several-stacks",
    "LO312": "target-matches-nothing",
    "LO313": "target-unreadable",
    "LO314": "not-projected",
    "LO315": "no-matrix",
    "LO316": "nothing-left",
    "LO317": "thawed-without-optimizer",
    "LO318": "part-in-backward",
    "LO319": "part-schedule",
    "LO320": "part-clip",
    "LO321": "does-not-divide",
    "LO322": "cannot-step-this",
    "LO323": "shared-parameter",
    "LO400": "cannot-work-together",
    "LO401": "schedule-and-average",
    "LO402": "warmup-without-schedule",
    "LO403": "schedule-without-warmup",
    "LO404": "schedule-args-alone",
    "LO405": "layer-pattern-alone",
    "LO406": "no-learning-rate",
    "LO407": "no-weight-decay",
    "LO408": "cannot-override",
    "LO409": "average-without-rate",
    "LO410": "target-without-projection",
    "LO411": "relative-step-and-rate",
    "LO412": "parts-and-schedule",
    "LO413": "parts-and-closure",
    "LO414": "schedule-for-build-optimizer",
    "LO415": "ignored-by-module",
    "LO416": "module-schedule-of-groups",
    "LO417": "mixin-last",
    "LO418": "two-who-choose",
    "LO419": "callback-without-optim",
    "LO420": "finder-and-callback",
    "LO421": "cli-two-optimizers",
    "LO422": "cli-needs-optim",
    "LO423": "other-lightning",
    "LO424": "module-has-several",
    "LO425": "module-steps-its-schedule",
    "LO501": "device",
    "LO502": "paging",
    "LO503": "xla-reads-back",
    "LO504": "no-cuda-graphs",
    "LO505": "no-compiler",
    "LO506": "sparse-gradients",
    "LO507": "complex-parameters",
    "LO508": "float16-weights",
    "LO509": "sharded-parameters",
    "LO510": "flattened-parameters",
    "LO511": "fused-sgd-on-cpu",
    "LO512": "fused-and-views",
    "LO513": "two-averages",
    "LO514": "finder-and-resume",
    "LO515": "plateau-unheard",
    "LO516": "graph-and-scaler",
    "LO517": "graph-and-processes",
    "LO518": "graph-and-own-backward",
    "LO519": "closure-and-scaler",
    "LO520": "closure-and-accumulation",
    "LO521": "closure-and-processes",
    "LO522": "no-process-group",
    "LO523": "one-group-only",
    "LO524": "matrices-only",
    "LO525": "coupled-in-backward",
    "LO526": "cycled-average",
    "LO527": "batch-norm-again",
    "LO528": "grokking-signal",
    "LO529": "metric-not-logged",
    "LO530": "monitor-unheard",
    "LO531": "part-clip-and-strategy",
    "LO532": "old-gpu",
    "LO533": "kernel-cannot-step-this",
    "LO534": "one-count-per-group",
    "LO601": "layerwise-under-strategy",
    "LO602": "layerwise-and-own-clipping",
    "LO603": "layerwise-ddp-and-manual",
    "LO604": "layerwise-and-own-backward",
    "LO605": "norm-clipping-alone",
    "LO606": "previous-norm-of-parts",
    "LO607": "norm-budget-alone",
    "LO608": "overflow-without-scaler",
    "LO609": "sparse-not-averaged",
    "LO610": "coupled",
    "LO611": "already-layerwise",
    "LO612": "fabric-scales",
    "LO613": "backward-inside-stepping",
    "LO614": "stepped-too-early",
    "LO615": "gradient-twice",
    "LO616": "no-gradient-somewhere",
    "LO617": "not-averaged",
    "LO618": "clips-nothing",
    "LO701": "no-fused-kernel",
    "LO702": "fused-in-backward",
    "LO703": "fused-and-foreach",
    "LO704": "fused-and-sparse",
    "LO705": "fused-and-complex",
    "LO706": "fused-strategy-and-views",
    "LO707": "fused-strategy-and-sgd",
    "LO708": "fused-and-dampening",
    "LO709": "fused-precision",
    "LO710": "one-device-only",
    "LO711": "not-for-xla",
    "LO712": "npu-strategy",
    "LO713": "npu-precision",
    "LO714": "no-such-device",
    "LO715": "pjrt-unset",
    "LO716": "xla-strategy",
    "LO717": "xla-precision",
    "LO718": "xla-downcast",
    "LO719": "backward-before-xla",
    "LO720": "nothing-to-shard",
    "LO721": "shard-option",
    "LO722": "double-and-shards",
    "LO723": "tied-and-sharded",
    "LO801": "damaged-checkpoint",
    "LO802": "unfinished-checkpoint",
    "LO803": "folder-not-file",
    "LO804": "no-checkpoint",
    "LO805": "holds-code",
    "LO806": "another-optimizers-state",
    "LO807": "other-groups",
    "LO808": "other-options",
    "LO809": "another-schedule",
    "LO810": "override-without-effect",
    "LO811": "within-a-step",
    "LO812": "whose-state",
    "LO813": "no-way-leads",
    "LO814": "number-of-optimizers",
    "LO815": "flattened-state",
    "LO901": "estimate-arguments",
    "LO902": "unknown-shape",
    "LO903": "estimate-in-a-group",
    "LO904": "cannot-be-estimated",
    "LO905": "estimate-strategy",
    "LO906": "nothing-fits",
    "LO907": "bench-request",
    "LO908": "bench-output",
    "LO909": "convert-source",
    "LO910": "check-subject",
}


def trees() -> Iterator[tuple[Path, ast.Module]]:
    for file in sorted(PACKAGE.rglob("*.py")):
        if "refusals" not in file.relative_to(PACKAGE).parts:
            yield file, ast.parse(file.read_text(encoding="utf-8"))


def used() -> set[str]:
    """The codes that modules name, as an argument, in a table of rules or in the class of an error."""
    nodes = (node for _, tree in trees() for node in ast.walk(tree))
    words = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return {word for word in words if CODE.fullmatch(word)}


# --- the table -------------------------------------------------------------------------------------------------------


def test_a_code_that_was_given_keeps_its_name() -> None:
    assert {code: entry.name for code, entry in ENTRIES.items()} == GIVEN
    assert len(set(GIVEN.values())) == len(GIVEN)
    assert sum(map(len, SECTIONS.values())) == len(ENTRIES)
    assert all(code == entry.code and CODE.fullmatch(code) for code, entry in ENTRIES.items())


def test_every_entry_says_why_and_what_to_do() -> None:
    for entry in ENTRIES.values():
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", entry.name), entry
        assert all(text[:1].strip() and text.endswith((".", ").")) for text in (entry.what, entry.why, entry.do)), entry


def test_every_entry_leads_to_a_page_that_is_there() -> None:
    for entry in ENTRIES.values():
        page, _, anchor = entry.page.partition("#")
        if page:
            headings = re.findall(r"^#+ (.*)$", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert not anchor or anchor in slugs, f"{entry.code} leads to {entry.page}"


def test_what_is_raised_has_an_entry_and_every_entry_is_raised() -> None:
    assert used() == {code for code, entry in ENTRIES.items() if not entry.retired}


def test_every_error_is_made_with_a_code() -> None:
    calls = [
        (f"{file.relative_to(PACKAGE)}:{node.lineno}", node)
        for file, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CLASSES
    ]
    assert len(calls) > 300
    assert not [where for where, call in calls if [keyword.arg for keyword in call.keywords] != ["code"]]


def test_every_class_has_a_code_of_its_own() -> None:
    codes = [cls("text").codes for cls in CLASSES.values()]
    assert len(codes) == len(set(codes))
    assert {code for (code,) in codes} <= ENTRIES.keys()


# --- the errors ------------------------------------------------------------------------------------------------------


class Own(InvalidOption):
    """As a plugin may derive one."""

    def __init__(self, name: str, value: int) -> None:
        super().__init__(f"{name}={value}")
        self.name = name

    def __reduce__(self) -> tuple[type[Own], tuple[str, int]]:
        return Own, (self.name, int(self.text.partition("=")[2]))


class Silent(InvalidOption):
    """Does not call the constructor of its base."""

    def __init__(self, name: str) -> None:
        self.name = name


@pytest.mark.parametrize("cls", CLASSES.values())
def test_an_error_ends_in_what_leads_to_more(cls: type[Refused]) -> None:
    error = cls("it is 'so'", code="LO204")
    assert str(error) == "it is 'so'\nSee: lightning-optim explain LO204"
    assert (error.text, said(error), error.args) == ("it is 'so'", "it is 'so'", ("it is 'so'",))
    general = cls("so")
    assert str(general) == f"so\nSee: lightning-optim explain {cls.codes[0]}"


@pytest.mark.parametrize("error", [*(cls("a\nb", code=("LO402", "LO404")) for cls in CLASSES.values()), Own("a", 1)])
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])
def test_an_error_is_copied_with_its_codes(error: Refused, copied: object) -> None:
    other = copied(error)  # type: ignore[operator]
    assert (type(other), str(other), other.codes) == (type(error), str(error), error.codes)
    assert vars(other) == vars(error)


def test_classes_that_others_derive_have_a_code() -> None:
    assert str(Own("lr", 3)) == "lr=3\nSee: lightning-optim explain LO200"
    assert Silent("lr").text == "lr"
    assert Silent("lr").codes == ("LO200",)


def test_errors_are_what_they_were() -> None:
    assert issubclass(UnknownOptimizer, (KeyError, ValueError))
    assert issubclass(MissingDependency, ImportError)
    assert MissingDependency("no", code="LO107").msg == "no"
    assert said(ValueError("other")) == "other"


def test_errors_are_joined_with_a_code_for_each_line() -> None:
    first, second = IncompatibleTrainer("one.", code="LO401"), InvalidOption("two.", code="LO204")
    assert joined([first]) is first
    both = joined([first, second, first])
    assert type(both) is IncompatibleTrainer
    assert str(both) == "one. [LO401]\ntwo. [LO204]\nSee: lightning-optim explain LO401 LO204"
    headed = joined([both, IncompatibleTrainer("three.", code="LO401")], "none:")
    assert headed.text == "none:\none. [LO401]\ntwo. [LO204]\nthree. [LO401]"
    assert headed.codes == ("LO401", "LO204")


def test_the_entries_are_read_on_demand() -> None:
    program = "import lightning_optim, sys; print([name for name in sys.modules if 'refusals' in name])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "lightning_optim.refusals" not in done.stdout


# --- the command -----------------------------------------------------------------------------------------------------


def explained(capsys: pytest.CaptureFixture[str], *codes: str) -> str:
    assert main(["explain", *codes]) == 0
    return capsys.readouterr().out


def test_explain_shows_entries_by_code_and_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    text = explained(capsys, "LO402", "lo309", "sharded-parameters")
    assert re.findall(r"^(LO\d+): ", text, re.MULTILINE) == ["LO402", "LO309", "LO509"]
    words = " ".join(text.split())
    for code in ("LO402", "LO309", "LO509"):
        entry = ENTRIES[code]
        assert all(part in words for part in (entry.name, entry.what, entry.why, entry.do, f"docs/{entry.page}"))
    assert max(map(len, text.splitlines())) <= 100


def test_explain_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    lines = explained(capsys).splitlines()
    assert [line.split()[:2] for line in lines[1:] if line.startswith("LO")] == [[c, n] for c, n in GIVEN.items()]
    assert max(map(len, lines)) <= 100


def test_explain_gives_plain_facts(capsys: pytest.CaptureFixture[str]) -> None:
    (entry,) = json.loads(explained(capsys, "LO402", "--json"))["entries"]
    assert entry == dataclasses.asdict(ENTRIES["LO402"])


def test_a_retired_code_is_explained_as_such() -> None:
    gone = dataclasses.replace(ENTRIES["LO402"], retired="Since 1.0 a warm-up needs no schedule.")
    text = as_text({"asked": True, "entries": [dataclasses.asdict(gone)]})
    assert "retired  Since 1.0 a warm-up needs no schedule." in text
    page = runpy.run_path(str(DOCS / "refusals.py"))
    assert "Not raised any more: Since 1.0 a warm-up needs no schedule." in "\n".join(page["paragraph"](gone))


@pytest.mark.parametrize(("text", "near"), [("LO100", "'LO101'"), ("shardd-parameters", "'sharded-parameters'")])
def test_explain_says_what_comes_near(text: str, near: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", text]) == 2
    assert f"there is no code and no name {text!r}" in (printed := capsys.readouterr().err)
    assert near in printed


def test_a_command_that_refuses_shows_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "adamw_toch"]) == 2
    assert capsys.readouterr().err.endswith("See: lightning-optim explain LO101\n")
