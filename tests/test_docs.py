"""Every snippet of the README and of the pages is executed, and what a page shows as output is compared.

The fences, by their info string:

- ``python``: executed; the blocks of a page share their names and run in order. A block whose first line is a comment
  with a file name (``# train.py``) is saved under that name instead.
- ``yaml``: saved under the name in its first line.
- ``pycon``: executed and compared by doctest; ``...`` stands for anything, line breaks do not count. The last line of
  an error, ``See: lightning-optim explain CODE``, may be left out.
- ``console``: commands after ``$``, in the directory of the saved files. They must succeed, unless the fence says
  ``console fails``; output is compared as in ``pycon``. ``console no-run`` marks what cannot run here, as installing.
- ``text``: with ``text output``, what the ``python`` block before it prints and logs.
- ``toml``: parsed.

``python xla`` and ``text output xla`` are for blocks that need torch_xla: ``make test-xla`` runs them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import doctest
import importlib.util
import io
import json
import logging
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning_utilities.core import rank_zero

import lightning_optim.testing
from lightning_optim import REGISTRY, command
from lightning_optim.build import TRAINING_ARGUMENTS, rules
from lightning_optim.build._curves import SCHEDULES
from lightning_optim.refusals import ENTRIES, SECTIONS
from lightning_optim.table._registry import ENTRY_POINT_GROUP

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *(page for folder in ("docs", "docs/identifiers", "docs/refusals") for page in (ROOT / folder).glob("*.md")),
    ]
)
KINDS = {"python", "yaml", "pycon", "console", "console fails", "console no-run", "text", "text output", "toml"}
FOR_XLA = {"python xla", "text output xla"}

_FENCE = re.compile(r"^(?P<ticks>`{3,})(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=ticks)$", re.MULTILINE | re.DOTALL)
_FILE_NAME = re.compile(r"# (?P<name>\w+\.(py|yaml))$", re.MULTILINE)
_LENIENT = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
_SEE = re.compile(r"^See: lightning-optim explain [LO\d ]+$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    kind: str
    body: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def _blocks(page: Path) -> Iterator[Block]:
    """Yields the page's fenced blocks, without the directives of MyST."""
    text = page.read_text(encoding="utf-8")
    for match in _FENCE.finditer(text):
        kind = match["info"].strip()
        if not kind.startswith("{"):
            yield Block(page, text.count("\n", 0, match.start()) + 1, kind, match["body"])


class _Checker(doctest.OutputChecker):
    """Compares an output with and without the line that leads to more about an error."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return any(super(_Checker, self).check_output(want, each, optionflags) for each in (got, _SEE.sub("", got)))


class _Page:
    """The state that the blocks of one page share."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {"__name__": "page"}
        self.printed = ""

    def run(self, block: Block) -> None:
        if block.kind in FOR_XLA and importlib.util.find_spec("torch_xla"):
            block = dataclasses.replace(block, kind=block.kind.removesuffix(" xla"))
        file_name = _FILE_NAME.match(block.body)
        if file_name and block.kind in ("python", "yaml"):
            Path(file_name["name"]).write_text(block.body, encoding="utf-8")
        elif block.kind == "python":
            self._python(block)
        elif block.kind == "pycon":
            self._pycon(block)
        elif block.kind in ("console", "console fails"):
            self._console(block)
        elif block.kind == "text output":
            _compare(block, block.body, self.printed)
        elif block.kind == "yaml":
            yaml.safe_load(block.body)
        elif block.kind == "toml":
            pytest.importorskip("tomllib").loads(block.body)

    def _python(self, block: Block) -> None:
        # Tracebacks show the page and its line.
        code = compile("\n" * block.line + block.body, str(block.page), "exec", dont_inherit=True)
        with _captured() as printed:
            exec(code, self.names)
        self.printed = printed.getvalue()

    def _pycon(self, block: Block) -> None:
        test = doctest.DocTestParser().get_doctest(block.body, self.names, block.where, str(block.page), block.line)
        output: list[str] = []
        with contextlib.redirect_stderr(io.StringIO()):
            doctest.DocTestRunner(_Checker(), optionflags=_LENIENT).run(test, out=output.append, clear_globs=False)
        if output:
            pytest.fail("".join(output), pytrace=False)
        self.names.update(test.globs)

    def _console(self, block: Block) -> None:
        # A command goes on after a backslash; its output follows until the next command.
        for part in re.split(r"^\$ ", block.body.replace("\\\n", " "), flags=re.MULTILINE)[1:]:
            line, _, expected = part.partition("\n")
            with _captured() as printed:
                status = _run(shlex.split(line))
            assert bool(status) == (block.kind == "console fails"), f"{block.where}: {line}\n{printed.getvalue()}"
            if expected.strip():
                _compare(block, expected, printed.getvalue())


@contextlib.contextmanager
def _captured() -> Iterator[io.StringIO]:
    """Collects what is printed, and what Lightning and we log on rank 0."""
    printed = io.StringIO()
    handler = logging.StreamHandler(printed)
    rank_zero.log.addHandler(handler)
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            yield printed
    finally:
        rank_zero.log.removeHandler(handler)


def _run(arguments: list[str]) -> int:
    """Runs a command of a page in this process, where everything is imported already; returns its exit status."""
    # Files of the repository are named as seen from its root.
    program, *rest = [str(ROOT / word) if (ROOT / word).is_file() else word for word in arguments]
    imported = set(sys.modules)
    try:
        if program == "lightning-optim":
            return command.main(rest)
        assert program == "python", f"pages may run python and lightning-optim, not {program}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", rest)
            patch.syspath_prepend(str(Path(rest[0]).resolve().parent))
            runpy.run_path(rest[0], run_name="__main__")
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    finally:
        for name in set(sys.modules) - imported:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(Path.cwd())):
                del sys.modules[name]
    return 0


def _compare(block: Block, expected: str, printed: str) -> None:
    # Rich output ends its lines with spaces, and runs print more than a page shows: ... stands for it.
    checker, example = _Checker(), doctest.Example("", expected)
    if not checker.check_output(expected, printed, _LENIENT):
        difference = checker.output_difference(example, printed, _LENIENT)
        pytest.fail(f"{block.where} shows an output that does not come.\n{difference}", pytrace=False)


@pytest.fixture
def _isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory of its own; what a page registers is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(REGISTRY, "_specs", dict(REGISTRY._specs))
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")


def _name(page: Path) -> str:
    return page.stem if page.parent.name in ("docs", ROOT.name) else f"{page.parent.name}-{page.stem}"


@pytest.mark.parametrize("page", PAGES, ids=_name)
@pytest.mark.usefixtures("_isolated")
def test_snippets_run(page: Path) -> None:
    state = _Page()
    for block in _blocks(page):
        assert block.kind in KINDS | FOR_XLA, f"{block.where}: no rule for ```{block.kind}"
        state.run(block)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_lead_somewhere(page: Path) -> None:
    prose = _FENCE.sub("", page.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", prose):
        assert re.match(r"https?://", link) or (page.parent / link).exists(), f"{page.name} links to {link}"


def _identifiers(text: str) -> set[str]:
    return set(re.findall(r"`([a-z0-9_]+)`", text))


def _section(page: Path, heading: str) -> str:
    text = page.read_text(encoding="utf-8")
    assert f"# {heading}\n" in text, f"{page.name} has no section {heading!r}"
    return text.partition(f"# {heading}\n")[2].partition("\n#")[0]


def test_readme_lists_every_identifier() -> None:
    table = re.findall(r"^\|.*", _section(ROOT / "README.md", "Optimizers"), re.MULTILINE)
    shown = _identifiers("\n".join(table))
    missing = {name: spec for name, spec in REGISTRY.plain.items() if name not in shown}
    rows = "\n".join(f"| {spec.summary} | `{name}` | {spec.extra} |" for name, spec in missing.items())
    assert not [*missing], f"the table in README.md lacks names. Add them to a line of it, or lines such as\n{rows}"
    assert not shown - set(REGISTRY.plain), "the table in README.md has names of no row. Take them out"


def test_comparison_counts_what_there_is() -> None:
    from transformers.training_args import OptimizerNames

    theirs = [optimizer.value for optimizer in OptimizerNames]
    stepped = [name for name, spec in REGISTRY.plain.items() if not spec.coupled]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"| optimizers by name | {len(REGISTRY.plain)}, any other by its path | {len(theirs)} |" in readme
    in_backward = [name for name in theirs if name.endswith("_layerwise")]
    assert f"gradients freed at once | {len(stepped)} names | {len(in_backward)} names |" in readme
    page = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
    assert f"| lightning-optim | [{len(REGISTRY.plain)} names]" in page
    assert f"[`_layerwise`](layerwise.md) for {len(stepped)} names" in page
    assert f"| transformers | {len(theirs)} names |" in page
    assert all(f"`{name}`" in page for name in in_backward)
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
    for text in (readme, page):
        assert f"transformers {pinned['transformers']}, lightning {pinned['lightning']}, timm" in " ".join(text.split())


def test_generated_pages_cover_the_table(tmp_path: Path) -> None:
    generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    generate["main"](tmp_path)
    identifiers = (tmp_path / "identifiers.md").read_text(encoding="utf-8")
    schedules = (tmp_path / "schedules.md").read_text(encoding="utf-8")
    arguments = (tmp_path / "arguments.md").read_text(encoding="utf-8")
    for name in ("layerwise", "families", "monitor", "sharded", "dealt"):
        written = json.loads((ROOT / "docs" / "bench" / f"{name}.json").read_text(encoding="utf-8"))
        table = (tmp_path / f"measured-{name}.md").read_text(encoding="utf-8")
        digits = 3 if name == "monitor" else 2
        shown = [f"{one['ratio']['median']:.{digits}f}" for one in written["records"]]
        assert len(shown) > (2 if name == "dealt" else 7)
        assert all(f"| {figure} " in table for figure in shown)
        assert written["machine"]["device"] in table
        pages = [page.read_text(encoding="utf-8") for page in PAGES]
        assert sum(f"{{include}} generated/measured-{name}.md" in page for page in pages) == 1
    steps = json.loads((ROOT / "docs" / "bench" / "muon_steps.json").read_text(encoding="utf-8"))
    muon = (tmp_path / "measured-muon.md").read_text(encoding="utf-8")
    assert all(f"| {one['loss']:.3f} |" in muon for one in (steps["adamw_torch"], *steps["muon"].values()))
    tried = json.loads((ROOT / "docs" / "bench" / "tried.json").read_text(encoding="utf-8"))["rows"]
    table = (tmp_path / "tried.md").read_text(encoding="utf-8")
    assert all(f"| {row['tests']:,} | {row['identifiers']} | `{row['command']}` |" in table for row in tried)
    stress = json.loads((ROOT / "docs" / "bench" / "stress.json").read_text(encoding="utf-8"))
    table = (tmp_path / "measured-stress.md").read_text(encoding="utf-8")
    assert stress["counts"]["failed"] == 0
    assert all(f"| {stress['counts'][kind]:,} |" in table for kind in ("cells", "trained", "refused", "exception"))
    assert set(REGISTRY.plain) <= _identifiers(identifiers)
    sections = []
    for page in sorted((ROOT / "docs" / "identifiers").glob("*.md")):
        assert f"{{include}} ../generated/identifiers-{page.stem}.md" in page.read_text(encoding="utf-8")
        assert f"\nidentifiers/{page.stem}\n" in (ROOT / "docs" / "identifiers.md").read_text(encoding="utf-8")
        text = (tmp_path / f"identifiers-{page.stem}.md").read_text(encoding="utf-8")
        sections += re.findall(r"^\(optim-(\w+)\)=\n## \1$", text, re.MULTILINE)
    assert len(list(tmp_path.glob("identifiers-*.md"))) == len(list((ROOT / "docs" / "identifiers").glob("*.md")))
    # One each, and no name twice.
    assert sorted(sections) == sorted(REGISTRY.plain)
    assert set(SCHEDULES) <= _identifiers(schedules)
    for row in TRAINING_ARGUMENTS.values():
        assert f"| `{row.name}`" in arguments


def test_api_page_documents_every_public_name() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\.\. auto\w+:: (\w+)(?:\(.*\))?$", text, re.MULTILINE))
    # OptimCLI needs an optional package, so that `import *` leaves it out.
    checking = {"check_optimizer", "check_results", "Result", "BrokenPromise"}
    assert documented == {*lightning_optim.__all__, "OptimCLI", *checking}
    assert checking <= set(lightning_optim.testing.__all__)


def test_refusals_page_has_every_entry(tmp_path: Path) -> None:
    runpy.run_path(str(ROOT / "docs" / "generate.py"))["main"](tmp_path)
    overview = (ROOT / "docs" / "refusals.md").read_text(encoding="utf-8")
    index = (tmp_path / "refusals-index.md").read_text(encoding="utf-8")
    for section, entries in SECTIONS.items():
        page = (ROOT / "docs" / "refusals" / f"{section}.md").read_text(encoding="utf-8")
        assert f"{{include}} ../generated/refusals-{section}.md" in page
        assert f"\nrefusals/{section}\n" in overview
        shown = (tmp_path / f"refusals-{section}.md").read_text(encoding="utf-8")
        for entry in entries:
            assert shown.count(f"({entry.code})=\n## {entry.code}: {entry.name}\n") == 1
            assert entry.do in shown
            assert f"[{entry.code}](refusals/{section}.md#{entry.code.lower()}-{entry.name}) {entry.name}" in index
    tables = (rules.CONFIG_RULES, rules.RUN_RULES, rules.DEMAND_RULES, rules.FUSED_RULES, rules.LAYERWISE_RULES)
    assert {code for table in tables for code in table} <= ENTRIES.keys()


def test_migration_page_names_what_hugging_face_has() -> None:
    from transformers import SchedulerType
    from transformers.training_args import OptimizerNames

    page = ROOT / "docs" / "migrating.md"
    # The last one it has dropped.
    names = {*(optimizer.value for optimizer in OptimizerNames), "adamw_apex_fused"}
    missing = {name for name in names if name not in REGISTRY}
    assert _identifiers(_section(page, "Names that are not here")) == missing | (
        {schedule.value for schedule in SchedulerType} - set(SCHEDULES)
    )


def test_entry_point_group_is_the_registrys() -> None:
    text = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    assert f'[project.entry-points."{ENTRY_POINT_GROUP}"]' in text


def test_changelog_knows_the_version() -> None:
    assert f"## {lightning_optim.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
