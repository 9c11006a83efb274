"""What is recommended: the choosing guide's table, what fits, sources for all of it, and lines that run."""

from __future__ import annotations

import shlex
from functools import cache
from typing import Any

import lightning as L
import pytest
import torch

from lightning_optim import FSDP2Strategy, InvalidOption, OptimCallback, OptimCLI, OptimConfig, Shape, recommend
from lightning_optim.choose import CHOOSING, EVIDENCE, Estimator, MemoryEstimate, Recommendation, rank
from lightning_optim.table import REGISTRY
from tests.models import ForeignTokens, LitTokens
from tests.processes import ROOT

GIB = 2**30
#: Few and wide layers, which are soon run: 0.3 million parameters, 1.3 billion and 7.4 billion.
SHAPES = {
    "small": Shape("llama", hidden=128, layers=2, heads=4, intermediate=256, vocab=512, length=64),
    "1B": Shape("llama", hidden=6144, layers=2, heads=32, intermediate=16384, vocab=32000, length=64),
    "7B": Shape("llama", hidden=16384, layers=2, heads=32, intermediate=43690, vocab=32000, length=64),
}


@cache
def estimator(size: str) -> Estimator:
    return Estimator(SHAPES[size], precision="bf16-true")


@cache
def adamw_of(size: str) -> MemoryEstimate:
    return estimator(size).estimate(OptimConfig("adamw_torch"))


def ranked(size: str, memory: int | None = None, **wanted: Any) -> list[Recommendation]:
    """Ranks with one fake run per shape."""
    return rank(estimator(size), {}, memory=memory, **wanted)


def room(size: str, word: str) -> int | None:
    """Returns as much memory as the guide's word means."""
    adamw, bare = adamw_of(size).resident, adamw_of(size).parameters + adamw_of(size).gradients
    sizes = {"enough": adamw, "plenty": 2 * adamw, "little": adamw - 1, "hardly any": bare - 1}
    return sizes.get(word)


@pytest.mark.parametrize(
    ("size", "memory", "wanted", "first"),
    [
        # The guide's table, row by row.
        ("small", "enough", {}, {"adamw_torch", "adamw_torch_fused"}),
        ("1B", "enough", {}, {"adamw_8bit", "lion_32bit"}),
        ("7B", "enough", {}, {"galore_adamw", "paged_adamw_8bit"}),
        ("small", "plenty", {"prefer": "speed"}, {"adamw_torch_fused", "adamw_apex_fused"}),
        ("7B", "plenty", {"prefer": "speed"}, {"adamw_torch_fused", "adamw_apex_fused"}),
        ("7B", "hardly any", {}, {"galore_adamw_8bit_layerwise", "lomo"}),
        ("1B", "enough", {"task": "finetune"}, {"galore_adamw", "adamw_8bit"}),
        ("small", "enough", {"task": "vision"}, {"adamw_torch", "lion_32bit"}),
        *((size, "enough", {"task": "sparse"}, {"adagrad"}) for size in SHAPES),
        *((size, "plenty", {"task": "sparse"}, {"adagrad"}) for size in SHAPES),
        ("small", "none given", {}, {"adamw_torch"}),
    ],
)
def test_the_guide(size: str, memory: str, wanted: dict[str, Any], first: set[str]) -> None:
    found = ranked(size, room(size, memory), **wanted)
    assert {one.optim for one in found[: len(first)]} == first


def test_the_guide_for_little_memory() -> None:
    """Where little is just less than AdamW takes, our estimate also has names in 32 bits that fit: not the first."""
    found = ranked("1B", room("1B", "little"))
    assert found[0].optim == "adamw_8bit"
    assert {"adamw_8bit", "lion_8bit"} <= {one.optim for one in found[:3]}
    found = ranked("7B", room("7B", "little"))
    assert {"adamw_8bit", "lion_8bit"} <= {one.optim for one in found[:4]}


def test_more_memory_never_leads_to_a_smaller_state() -> None:
    """With plenty, a language model of any size is answered by AdamW, not by an optimizer that saves."""
    for size in SHAPES:
        first = ranked(size, room(size, "plenty"), task="finetune")[0]
        assert first.optim == "adamw_torch_fused"
        assert first.conditions == ({"memory": 1, "size": 1} if size == "small" else {"memory": 1}), size


def test_all_that_is_recommended_fits_and_has_a_reason() -> None:
    memory = room("7B", "little")
    assert memory is not None
    for prefer in ("memory", "speed", "quality"):
        found = ranked("7B", memory, prefer=prefer)
        assert found == ranked("7B", memory, prefer=prefer)
        for one in found:
            assert one.estimate.resident <= memory
            assert all(claim.says in one.reason and claim.source.name in one.reason for claim in one.evidence)
    least = [one.estimate.resident for one in ranked("7B", memory, prefer="memory")]
    assert least == sorted(least)


def test_each_claim_has_a_source_and_names_that_exist() -> None:
    for claim in EVIDENCE:
        assert claim.says
        assert claim.source.name
        assert claim.source.link.startswith("https://")
        assert all(REGISTRY.find(name) for name in claim.optims)


def test_the_page_has_the_guide_that_claims_link_to() -> None:
    page = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    rows = [claim for claim in EVIDENCE if claim.source == CHOOSING]
    table = [f"| {claim.says} | {', '.join(f'`{name}`' for name in claim.optims)} |" for claim in rows]
    assert "\n".join(table) in page
    assert CHOOSING.link.endswith("docs/choosing.md#the-guides-table")
    assert "## The guide's table" in page


def test_a_missing_package_is_told() -> None:
    (apex,) = [one for one in ranked("small", room("small", "plenty")) if one.optim == "adamw_apex_fused"]
    assert apex.missing == REGISTRY["adamw_apex_fused"].availability().reasons


def test_nothing_fits() -> None:
    with pytest.raises(InvalidOption, match=r"nothing fits into 1.00 GiB: '\w+' needs the least, .*checkpointing"):
        ranked("7B", GIB)


@pytest.mark.parametrize("wrong", [{"task": "audio"}, {"prefer": "price"}])
def test_wrong_words(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption, match="is not one of"):
        ranked("small", **wrong)


class Words(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=torch.int64)


def test_shards_are_recommended_with_the_lines_to_paste(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shape = Shape("llama", hidden=64, layers=1, heads=4, intermediate=96, vocab=128, length=8)
    setting: Any = {"batch": (1, 8), "strategy": "fsdp2", "devices": 2, "accelerator": "cpu"}
    first = recommend(shape, **setting)[0]
    assert first.optim == "adamw_torch"
    names: dict[str, Any] = {"L": L, "OptimCallback": OptimCallback}
    exec(first.python, names)
    cli = OptimCLI(LitTokens, args=shlex.split(first.command_line)[3:], run=False)
    for trainer in (names["trainer"], cli.trainer):
        assert type(trainer.strategy) is FSDP2Strategy
    with pytest.raises(InvalidOption, match=r"smaller model, or more devices"):
        recommend(shape, memory=1, **setting)
    with pytest.raises(InvalidOption, match=r"shard the parameters over devices \(strategy='fsdp2'"):
        recommend(shape, memory=1)


def test_the_lines_run(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for one in recommend(ForeignTokens(), accelerator="cpu", gradient_clip_val=0.5)[:2]:
        names: dict[str, Any] = {"L": L, "OptimCallback": OptimCallback}
        exec(one.python, names)
        trainer = names["trainer"]
        trainer.fit_loop.max_epochs = 1
        model = ForeignTokens()
        trainer.fit(model, torch.utils.data.DataLoader(Words()))
        assert trainer.global_step == 2
        assert trainer.gradient_clip_val == 0.5
        words = [*shlex.split(one.command_line)[3:], "--trainer.logger", "false"]
        cli = OptimCLI(LitTokens, args=words, run=False)
        assert cli.config["optim"] == one.optim
