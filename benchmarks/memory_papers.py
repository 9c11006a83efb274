"""Prints bytes of optimizer state next to those that papers give, as docs/memory.md shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_optim import estimate_memory

# As the training script of https://github.com/jiaweizzhao/GaLore chooses them.
BLOCKS = ("query", "key", "value", "out", "gate", "up", "down")


@dataclass(frozen=True)
class Figure:
    """One figure of a paper and the requests that come near it."""

    shape: str
    optim: str
    paper: str
    requests: Sequence[str]


GALORE = tuple(
    Figure(f"llama-{size}", "galore_adamw", paper, (f"rank={rank},state_dtype=parameter", f"rank={rank}"))
    for size, rank, paper in (("60m", 128, "0.13"), ("130m", 256, "0.28"), ("350m", 256, "0.54"), ("1b", 512, "1.78"))
)
NARROW = "state_dtype=parameter"
APOLLO = (
    Figure("llama-7b", "adamw_8bit", "13", ("", "quantize_embeddings=True")),
    Figure("llama-7b", "galore_adamw_8bit", "4.9", ("rank=1024", f"rank=1024,{NARROW},quantize_embeddings=True")),
    Figure("llama-7b", "apollo_adamw", "1.6", ("rank=256", f"rank=256,{NARROW}")),
    Figure("llama-7b", "apollo_adamw", "0.0", ("rank=1,scale=128,scale_type=tensor",)),
)


def state(shape: str, optim: str, args: str, blocks_only: bool = False, precision: str = "bf16-true") -> int:
    """Returns the bytes of a state."""
    targets = list(BLOCKS) if blocks_only else None
    return estimate_memory(
        shape, optim, optim_args=args or None, optim_target_modules=targets, precision=precision
    ).state


def main() -> None:
    """Prints the tables."""
    print("| shape | paper, GB | parameters' dtype | float32 | parameters' dtype, blocks only |")
    print("| --- | --- | --- | --- | --- |")
    for figure in GALORE:
        found = [state(figure.shape, figure.optim, args) for args in figure.requests]
        found.append(state(figure.shape, figure.optim, figure.requests[0], blocks_only=True))
        print(f"| {figure.shape} | {figure.paper} | {' | '.join(f'{size / 1e9:.2f}' for size in found)} |")
    print("\n| identifier | paper | options | GB | GiB |\n| --- | --- | --- | --- | --- |")
    for figure in APOLLO:
        for args in figure.requests:
            size = state(figure.shape, figure.optim, args)
            shown = f"`{args}`" if args else "defaults"
            print(f"| `{figure.optim}` | {figure.paper} G | {shown} | {size / 1e9:.2f} | {size / 2**30:.2f} |")
    print("\n| GPT-2 medium, float32 | less state than `adamw_torch` |\n| --- | --- |")
    whole = state("gpt2-medium", "adamw_torch", "", precision="32-true")
    for args in ("quantize_embeddings=True", ""):
        saved = 1 - state("gpt2-medium", "adamw_8bit", args, precision="32-true") / whole
        print(f"| `adamw_8bit`, {f'`{args}`' if args else 'defaults'} | {saved:.1%} |")


if __name__ == "__main__":
    main()
