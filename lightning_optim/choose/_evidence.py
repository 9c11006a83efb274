"""What is known of which optimizer to choose: one row a claim, each with its source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Task = Literal["pretrain", "finetune", "vision", "sparse"]
#: Of the device's memory, as the project's guide words it: "plenty" is twice what ``adamw_torch`` takes or more; in
#: "little" it does not fit; in "hardly any" not even parameters and gradients do.
Room = Literal["plenty", "little", "hardly any"]


@dataclass(frozen=True)
class Source:
    """Where a claim is made."""

    name: str
    link: str


@dataclass(frozen=True)
class Evidence:
    """A claim and the cases that it is about.

    Attributes:
        optims: The identifiers that it recommends.
        says: What it says, with the figure if there is one.
        source: Who says it.
        tasks: The tasks that it is about; empty for any.
        least: From this many parameters on.
        below: Up to this many parameters, not included.
        rooms: How much memory there is, ``None`` if that is not said or none of the words; empty for any.
    """

    optims: tuple[str, ...]
    says: str
    source: Source
    tasks: tuple[Task, ...] = ()
    least: float = 0
    below: float = float("inf")
    rooms: tuple[Room | None, ...] = ()

    def points(self, task: Task | None, parameters: int, room: Room | None) -> int | None:
        """Returns how many conditions the claim makes, if all are met, and ``None`` if one is not."""
        if (self.tasks and task not in self.tasks) or (self.rooms and room not in self.rooms):
            return None
        if not self.least <= parameters < self.below:
            return None
        return len(self.conditions)

    @property
    def conditions(self) -> tuple[str, ...]:
        """What it is about: of task, memory and size."""
        sized = self.least > 0 or self.below < float("inf")
        # That memory is not plenty goes without saying.
        roomy = bool(self.rooms) and None not in self.rooms
        given = {"memory": roomy, "task": bool(self.tasks), "size": sized}
        return tuple(name for name, holds in given.items() if holds)


_PAGES = "https://github.com/lightning-optim/lightning-optim/blob/main/docs"
#: Whose rows are the table of docs/choosing.md.
CHOOSING = Source("choosing guide of the project", f"{_PAGES}/choosing.md#the-guides-table")
_LANGUAGE: tuple[Task, ...] = ("pretrain", "finetune")
# Of a large model, or a language model, they say what saves memory; where there is plenty they say nothing.
_NOT_PLENTY: tuple[Room | None, ...] = (None, "little", "hardly any")

EVIDENCE = (
    Evidence(("adamw_torch", "adamw_torch_fused"), "for models below 1B parameters", CHOOSING, below=1e9),
    Evidence(("adamw_8bit", "lion_32bit"), "for models of 1B to 7B parameters", CHOOSING, (), 1e9, 6.5e9, _NOT_PLENTY),
    Evidence(
        ("galore_adamw", "paged_adamw_8bit"),
        "for models of 7B parameters and up",
        CHOOSING,
        (),
        6.5e9,
        rooms=_NOT_PLENTY,
    ),
    Evidence(("adamw_torch_fused", "adamw_apex_fused"), "for plenty of memory", CHOOSING, rooms=("plenty",)),
    Evidence(("adamw_8bit", "lion_8bit"), "for little memory", CHOOSING, rooms=("little",)),
    Evidence(("galore_adamw_8bit_layerwise", "lomo"), "for hardly any memory", CHOOSING, rooms=("hardly any",)),
    Evidence(("galore_adamw", "adamw_8bit"), "for language models", CHOOSING, _LANGUAGE, rooms=_NOT_PLENTY),
    Evidence(("adamw_torch", "lion_32bit"), "for vision", CHOOSING, tasks=("vision",)),
    Evidence(("adagrad",), "for recommenders and sparse data", CHOOSING, tasks=("sparse",)),
    Evidence(("adamw_torch",), "the first choice", CHOOSING),
    Evidence(
        ("adagrad",),
        "rates of each coordinate's own, for features that are rare",
        Source("Duchi et al., 2011", "https://jmlr.org/papers/v12/duchi11a.html"),
        tasks=("sparse",),
    ),
    Evidence(
        ("galore_adamw_8bit_layerwise",),
        "LLaMA-7B pretrained within 22.8 GB on an RTX 4090 (rank 1024, activation checkpointing)",
        Source("GaLore, arXiv 2403.03507, and its README", "https://arxiv.org/abs/2403.03507"),
        tasks=("pretrain",),
        rooms=("hardly any",),
    ),
    Evidence(
        ("apollo_adamw", "apollo_adamw_layerwise"),
        "LLaMA-7B after 150K steps: perplexity 13.02, APOLLO-Mini 13.09, 8-bit Adam 14.61",
        Source("APOLLO", "https://zhuhanqing.github.io/APOLLO/"),
        tasks=("pretrain",),
        least=6.5e9,
    ),
    Evidence(
        ("lomo", "adalomo"),
        "a 7B model fine-tuned on one RTX 3090; AdaLomo is the authors' advice without a gradient norm",
        Source("LOMO, arXiv 2306.09782", "https://arxiv.org/abs/2306.09782"),
        tasks=("finetune",),
        rooms=("hardly any",),
    ),
    Evidence(
        ("paged_adamw_8bit_layerwise",),
        "Llama-3.1-8B fine-tuned in full within 18.9 GiB on an RTX 4090 (2 x 2048 tokens, compiled)",
        Source("torchtune's README", "https://github.com/pytorch/torchtune"),
        tasks=("finetune",),
        least=6.5e9,
        rooms=("little", "hardly any"),
    ),
    Evidence(
        ("adamw_torch_4bit", "adamw_torch_8bit", "adamw_8bit"),
        "Llama2-7B on an A100: 33.2, 39.1 and 39.3 GB, fused AdamW 51.6; 2900, 2900 and 3000 tokens/s, fused 3200",
        Source("torchao's README", "https://github.com/pytorch/ao"),
        tasks=("finetune",),
        rooms=("little",),
    ),
    Evidence(
        ("ademamix",),
        "leads at scale with MARS and D-Muon among the optimizers compared",
        Source("EPFL's benchmark, arXiv 2509.01440", "https://arxiv.org/abs/2509.01440"),
        tasks=("pretrain",),
    ),
    Evidence(
        ("schedule_free_adamw",),
        "first of the self-tuning ruleset, 8-10% faster than the baseline; second of external tuning (0.7077)",
        Source("AlgoPerf, arXiv 2502.15015", "https://arxiv.org/abs/2502.15015"),
    ),
)

#: Where the suffix is explained: the same optimizer, for which the claims hold as well.
LAYERWISE = Source("docs/layerwise.md: the same steps, taken during backward", f"{_PAGES}/layerwise.md")
