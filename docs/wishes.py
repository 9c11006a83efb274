"""The short answers of docs/choosing.md: what to type for a wish, what was measured here, and what is published."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lightning_optim.choose import CHOOSING, EVIDENCE

GIB, MIB = 2**30, 2**20

Facts = dict[str, Any]
Read = Callable[[str], Facts]


@dataclass(frozen=True)
class Wish:
    """One wish.

    Attributes:
        title: The wish, a heading.
        types: What to type.
        why: When, in a sentence or two.
        trained: The identifiers whose loss and memory are shown, from choose.json.
        estimated: Those whose peak is shown, from memory.json, by strategy; ``"auto"`` is one device.
        shape: Of these.
        timed: Those whose time of a step is shown, from report.json.
        more: Another sentence of what was measured.
        published: Beginnings of the claims of ``EVIDENCE`` that are shown.
    """

    title: str
    types: tuple[str, ...]
    why: str
    trained: tuple[str, ...] = ()
    estimated: tuple[tuple[str, str], ...] = ()
    shape: str = "llama-7b"
    timed: tuple[str, ...] = ()
    more: Callable[[Read], str] | None = None
    published: tuple[str, ...] = ()


def _muon(read: Read) -> str:
    steps = read("muon_steps")
    best, adamw = steps["muon"]["0.75"], steps["adamw_torch"]
    return (
        f"loss {best['loss']:.3f} in {best['steps']} steps with `muon`, {adamw['loss']:.3f} in {adamw['steps']} with "
        f"`adamw_torch`: [Fewer steps](muon.md#fewer-steps)"
    )


WISHES = (
    Wish(
        "Nothing special",
        ('optim="adamw"',),
        "AdamW, fused wherever the device has it. Start here.",
        trained=("adamw_torch",),
        estimated=(("adamw_torch", "auto"), ("adamw_torch_fused", "auto")),
    ),
    Wish(
        "Less memory",
        ('optim="adamw_8bit_layerwise"', 'optim="adamw_torch_layerwise"'),
        "8 bits for the state, and gradients that go as soon as they come. The second changes no bit of the result.",
        trained=("adamw_8bit_layerwise", "adamw_torch_layerwise"),
        estimated=(("adamw_8bit_layerwise", "auto"), ("adamw_torch_layerwise", "auto")),
        published=("Llama2-7B on an A100",),
    ),
    Wish(
        "As little memory as possible",
        ('optim="galore_adamw_8bit_layerwise"', 'optim="apollo_mini_layerwise"', 'optim="adalomo"'),
        "State for a few directions of each matrix, or for its rows and columns.",
        trained=("galore_adamw_8bit_layerwise", "apollo_mini_layerwise", "adalomo"),
        estimated=(("galore_adamw_8bit_layerwise", "auto"), ("apollo_mini_layerwise", "auto"), ("lomo", "auto")),
        published=("LLaMA-7B pretrained within", "LLaMA-7B after 150K steps"),
    ),
    Wish(
        "No tuning",
        ('optim="schedule_free_adamw"', 'optim="prodigy"'),
        "The first needs no schedule and no number of steps, the second finds its learning rate: "
        "[Schedule-free](schedule-free.md), [more optimizers](more-optimizers.md).",
        trained=("schedule_free_adamw",),
        published=("first of the self-tuning",),
    ),
    Wish(
        "Pretraining a language model",
        ('optim="muon"', 'optim="ademamix"', 'optim="apollo_adamw_layerwise"'),
        "Muon where steps are to be fewer, APOLLO where memory is short.",
        trained=("muon",),
        more=_muon,
        published=("leads at scale", "LLaMA-7B after 150K steps"),
    ),
    Wish(
        "Fine-tuning a language model",
        ('optim="paged_adamw_8bit_layerwise"', 'optim="lomo"'),
        "All parameters on one card. Paged is 8-bit AdamW whose state leaves a device that is full. With adapters, "
        "where few parameters are trained, `adamw` is enough.",
        estimated=(("adamw_8bit_layerwise", "auto"), ("lomo", "auto")),
        published=("Llama-3.1-8B fine-tuned", "a 7B model fine-tuned"),
    ),
    Wish(
        "Vision",
        ('optim="adamw"', 'optim="lion_32bit"'),
        "Lion keeps half of AdamW's state; [its authors](https://arxiv.org/abs/2302.06675) take a learning rate 3 to "
        "10 times smaller. Nothing was measured here.",
    ),
    Wish(
        "Recommenders and sparse data",
        ('optim="adagrad"',),
        "`nn.Embedding(..., sparse=True)` needs an optimizer that takes sparse gradients: the sections of "
        "[Identifiers](identifiers.md) say which do. Nothing was measured here.",
        published=("rates of each coordinate's own",),
    ),
    Wish(
        "Several GPUs",
        (
            'optim="adamw_torch_fused_layerwise"` with `strategy="layerwise_fsdp2"',
            'optim="adamw_8bit"` with `strategy="ddp"',
        ),
        "Shards divide the state already; kernels of bitsandbytes take whole tensors, and are refused there. See "
        "[Sharded](sharded.md).",
        estimated=(
            ("adamw_torch_fused", "fsdp2"),
            ("adamw_torch_fused_layerwise", "layerwise_fsdp2"),
            ("galore_adamw_layerwise", "layerwise_fsdp2"),
        ),
        shape="llama-70b",
    ),
    Wish(
        "No GPU",
        ('optim="adamw"',),
        "Fused on a CPU, too. What else runs there: [One configuration, any device](accelerators.md).",
        timed=("adamw_torch_fused", "lion_32bit", "adamw_8bit"),
    ),
)


def wishes(read: Read) -> Iterator[str]:
    """Yields the answers."""
    for number, wish in enumerate(WISHES):
        if number:
            yield ""
        yield from (f"### {wish.title}", "", ", or ".join(f"`{text}`" for text in wish.types), "", wish.why)
        lines = [f"- {line}." for line in _figures(wish, read)]
        for beginning in wish.published:
            (claim,) = (one for one in EVIDENCE if one.says.startswith(beginning) and one.source != CHOOSING)
            names = ", ".join(f"`{name}`" for name in claim.optims)
            lines.append(f"- Published of {names} by [{claim.source.name}]({claim.source.link}): {claim.says}.")
        if lines:
            yield from ("", *lines)


def _figures(wish: Wish, read: Read) -> Iterator[str]:
    """Yields what was measured, each with the place where it stands in full."""
    if wish.trained:
        rows = {row["identifier"]: row for row in read("choose")["optimizers"]}
        shown = (
            f"{rows[name]['loss']:.2f} and {rows[name]['peak_bytes'] / MIB:.1f} MiB with `{name}`"
            for name in wish.trained
        )
        yield f"Measured ([table](#the-figures)): loss and peak of memory {', '.join(shown)}"
    if wish.more:
        yield f"Measured: {wish.more(read)}"
    if wish.timed:
        rows = {row["identifier"]: row for row in read("report")["optimizers"]}
        shown = (f"{rows[name]['step_ratio']:.2f} with `{name}`" for name in wish.timed)
        yield f"Measured ([an example](bench.md#an-example)): time of a step, `adamw_torch`'s is 1: {', '.join(shown)}"
    if wish.estimated:
        found = (one for one in read("memory")["records"] if "peak" in one)
        peaks = {(one["asked"], one["shape"], one["strategy"]): one["peak"] / GIB for one in found}
        sizes = (
            f"{peaks[name, wish.shape, strategy]:.1f} GiB with `{name}`"
            + (f" and `{strategy}`" if strategy != "auto" else "")
            for name, strategy in wish.estimated
        )
        size = wish.shape.removeprefix("llama-").upper()
        devices = "one device" if wish.estimated[0][1] == "auto" else "each of 8 devices"
        yield f"Estimated for a {size} ([Memory](memory.md#7b-13b-and-70b-by-strategy)), {devices}: {', '.join(sizes)}"
