"""Published rankings of optimizers, as claims to measure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Claim:
    """An order of identifiers that guides to the optimizers of Hugging Face's Trainer give, without figures.

    Attributes:
        name: What is ranked.
        measure: The key of a report's row that measures it; less is better.
        order: The identifiers, best first; those of one place are said to be alike.
    """

    name: str
    measure: str
    order: tuple[tuple[str, ...], ...]

    @property
    def places(self) -> dict[str, int]:
        """The claimed place of each identifier."""
        return {name: place for place, names in enumerate(self.order, start=1) for name in names}


CLAIMS = (
    Claim(
        "memory, low to high",
        "peak_bytes",
        (
            ("galore_adamw_8bit_layerwise",),
            ("adamw_8bit", "lion_8bit"),
            ("galore_adamw", "paged_adamw_8bit"),
            ("adamw_torch_8bit",),
            ("lion_32bit", "ademamix"),
            ("adamw_torch", "adamw_torch_fused"),
        ),
    ),
    Claim(
        "speed, fast to slow",
        "step_ratio",
        (
            ("adamw_torch_fused", "adamw_apex_fused"),
            ("adamw_torch",),
            ("lion_32bit", "lion_8bit"),
            ("adamw_8bit",),
            ("galore_adamw",),
            ("ademamix", "apollo_adamw"),
        ),
    ),
    Claim(
        "convergence, best to worst",
        "loss",
        (
            ("adamw_torch", "adamw_torch_fused"),
            ("ademamix",),
            ("galore_adamw",),
            ("lion_32bit",),
            ("adamw_8bit",),
        ),
    ),
)

#: Every identifier of the rankings, those that most others are compared with first.
RANKED = tuple(dict.fromkeys(name for claim in reversed(CLAIMS) for names in claim.order for name in names))
