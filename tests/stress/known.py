"""What is known of cells, as data: what is refused, and what goes wrong for a reason.

A cell that fits a row has to end as the row says. A row that no cell of the matrix ended by is itself an error: what it
knows is no longer so.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.stress.axes import DISTRIBUTED, Cell

Record = dict[str, Any]
When = Callable[[Cell], bool]


@dataclass(frozen=True)
class Known:
    """Something known of cells.

    Attributes:
        what: In a few words, for the table in the docs.
        when: Whether a cell is one of them.
        text: Regular expression for the error's or the failing check's text.
        why: The reason: a page of the docs for what is refused, else why it is as it is.
        control: Whether plain Lightning with the upstream class does the same.
        after_batches: Whether it is refused in the first step that shows it, not before.
        resume: Whether only going on from a checkpoint is refused, or goes wrong.
        stops: For an exception, whether it ends the fit, so that nothing else of its cell is tried. The generator keeps
            the values of such a row out of each other's cells, as it does those of what is refused. Other rows change
            no cell, so that what is learned from a run is judged by the same cells.
        cell: One that ends so, as ``python -m tests.stress --cell`` takes it: for a row about more than two values,
            which no cell of the array need have together.
    """

    what: str
    when: When
    text: str
    why: str
    control: bool = False
    after_batches: bool = False
    resume: bool = False
    stops: bool = False
    cell: str = ""

    def explains(self, cell: Cell, trouble: str) -> bool:
        """Whether this is what is known of the cell."""
        return self.when(cell) and re.search(self.text, trouble) is not None


def _row(**facts: Any) -> When:
    """Whether the identifier's row has these fields."""
    return lambda cell: all(bool(getattr(cell.case.row, name)) is value for name, value in facts.items())


def _has(axis: str, *values: str) -> When:
    return lambda cell: cell[axis] in values


def _all(*conditions: When) -> When:
    return lambda cell: all(condition(cell) for condition in conditions)


def _any(*conditions: When) -> When:
    return lambda cell: any(condition(cell) for condition in conditions)


def _steps_in_backward(cell: Cell) -> bool:
    return cell["form"] == "layerwise" or cell.case.in_backward


def _for_matrices(cell: Cell) -> bool:
    return cell.case.row.takes != "all"


def _projects(cell: Cell) -> bool:
    return cell.case.projects


_FUSED = ("adamw", "adamw_torch", "adamw_torch_fused", "sgd", "adagrad")

#: What is refused before the first batch, with an error of lightning_optim: docs/refusals.md.
REFUSED = (
    Known(
        "float16 weights for an optimizer that computes in their type",
        _all(_has("precision", "16-true"), _row(half_weights=False)),
        "computes in the parameters' dtype",
        "refusals.md",
    ),
    Known(
        "an embedding with `sparse=True` for an optimizer of dense gradients",
        _all(_has("module", "sparse"), _row(sparse=False), lambda cell: cell["callback"] != "BackboneFinetuning"),
        "cannot step sparse gradients",
        "refusals.md",
    ),
    Known(
        "an embedding with `sparse=True` whose gradients are averaged in hooks",
        _all(_has("module", "sparse"), _has("strategy", "layerwise_ddp")),
        "averages dense gradients|cannot step sparse",
        "refusals.md",
    ),
    Known(
        "an embedding with `sparse=True` under fused kernels",
        _all(_has("module", "sparse"), _has("strategy", "fused", "fused_ddp")),
        "fused kernels cannot step sparse gradients|cannot step sparse",
        "refusals.md",
    ),
    Known(
        "complex parameters for an optimizer of real ones",
        _all(_has("module", "complex"), _row(complex=False)),
        "cannot step complex parameters",
        "refusals.md",
    ),
    Known(
        "complex parameters under fused kernels",
        _all(_has("module", "complex"), _has("strategy", "fused", "fused_ddp")),
        "fused kernels step real floating-point|cannot step complex",
        "refusals.md",
    ),
    Known(
        "a layerwise optimizer under a strategy that needs gradients after backward",
        _all(_steps_in_backward, _has("strategy", "ddp", "fused_ddp", "fused")),
        "works on gradients after|is stepped during backward|no fused kernel",
        "refusals.md",
    ),
    Known(
        "fused kernels for an optimizer that has none",
        _all(_has("strategy", "fused", "fused_ddp"), lambda cell: cell["identifier"] not in _FUSED),
        "no fused kernel",
        "refusals.md",
    ),
    Known(
        "fused SGD with half-precision weights on a CPU",
        _all(
            _has("strategy", "fused", "fused_ddp"), _has("identifier", "sgd"), _has("precision", "bf16-true", "16-true")
        ),
        "leaves half-precision parameters",
        "refusals.md",
    ),
    Known(
        "an optimizer that couples its parameters, stepped during backward",
        _all(
            _row(coupled=True),
            _any(_has("form", "layerwise"), _has("strategy", "layerwise", "layerwise_ddp", "layerwise_fsdp2")),
        ),
        "under a strategy that steps during backward|_layerwise",
        "refusals.md",
    ),
    Known(
        "an optimizer that is wrong on shards",
        _all(_has("strategy", "layerwise_fsdp2"), _row(sharded=False)),
        "cannot step sharded parameters|steps during backward",
        "refusals.md",
    ),
    Known(
        "a schedule for a schedule-free optimizer",
        _all(_row(averages_weights=True), lambda cell: cell["schedule"] != "none"),
        "averages its iterates",
        "refusals.md",
    ),
    Known(
        "averages of weights with a schedule-free optimizer",
        _all(_row(averages_weights=True), _has("callback", "EMA", "SWA")),
        "both exchange the weights",
        "refusals.md",
    ),
    Known(
        "a parameter without a gradient under `layerwise_ddp`",
        _all(_has("module", "unused"), _has("strategy", "layerwise_ddp")),
        "got no gradient",
        "refusals.md",
        after_batches=True,
    ),
    Known(
        "a gradient that arrives twice: a tied weight in reentrant checkpoints",
        _all(_has("module", "tied"), _has("checkpointing", "reentrant"), lambda cell: cell.in_backward),
        "twice",
        "refusals.md",
        after_batches=True,
        cell="form=layerwise; checkpointing=reentrant; module=tied",
    ),
    Known(
        "an embedding with `sparse=True` that is thawed for an optimizer of dense gradients",
        _all(_has("module", "sparse"), _has("callback", "BackboneFinetuning"), _row(sparse=False)),
        "cannot step sparse gradients",
        "refusals.md",
        after_batches=True,
        cell="identifier=adamw_torch; callback=BackboneFinetuning; module=sparse",
    ),
    Known(
        "`64-true` under FSDP2",
        _all(_has("strategy", "layerwise_fsdp2"), _has("precision", "64-true")),
        "precision='64-true'",
        "refusals.md",
    ),
    Known(
        "stacks of matrices in shards, for an optimizer that projects",
        _all(_projects, _has("module", "experts"), _has("strategy", "layerwise_fsdp2")),
        "cannot step stacks of matrices|cannot step sharded",
        "sharded.md",
        cell="identifier=galore_adamw; strategy=layerwise_fsdp2; module=experts",
    ),
    Known(
        "an optimizer for matrices, of which none trains before `BackboneFinetuning` thaws",
        _all(_has("callback", "BackboneFinetuning"), _any(_projects, _for_matrices)),
        "has no hidden matrix|has no matrix|projects nothing",
        "param-groups.md",
    ),
    Known(
        "float16 weights for the optimizer of what is no matrix",
        _all(_has("precision", "16-true"), _for_matrices),
        "computes in the parameters' dtype",
        "refusals.md",
    ),
    Known(
        "`reduce_lr_on_plateau` in a barebones Trainer",
        _all(_has("flag", "barebones"), _has("schedule", "plateau")),
        "barebones=True",
        "refusals.md",
    ),
    Known(
        "going on from a checkpoint with a finder among the callbacks",
        _has("callback", "LearningRateFinder", "BatchSizeFinder"),
        "Lightning has forgotten the checkpoint",
        "refusals.md",
        resume=True,
    ),
)

#: What goes wrong, and why it is not mended here.
EXCEPTIONS = (
    Known(
        "`accumulate_grad_batches` beside `GradientAccumulationScheduler`",
        _all(_has("callback", "GradientAccumulationScheduler"), _has("accumulation", "2", "3")),
        "You have set `accumulate_grad_batches`",
        "Lightning's: one of the two says how much is accumulated",
        control=True,
        stops=True,
    ),
    Known(
        "`64-true`: a checkpoint goes through float32",
        _has("precision", "64-true"),
        "^split: (weights|optimizer).* apart",
        "Lightning's: it loads the weights before it makes the module one of float64",
        control=True,
        resume=True,
    ),
    Known(
        "a checkpoint of an epoch's last batch, and a plateau schedule",
        _all(_has("callback", "ModelCheckpoint"), _has("schedule", "plateau")),
        "^split: (weights|optimizer)",
        "Lightning's: it saves before it steps the schedule, and leaves out the validation that was due next",
        control=True,
        resume=True,
    ),
    Known(
        "`EarlyStopping` by what each process logs for itself",
        _all(_has("strategy", *sorted(DISTRIBUTED)), _has("callback", "EarlyStopping")),
        r"^split: \d+ and \d+ steps",
        "Lightning's: a checkpoint has the best score of the first process; `self.log(..., sync_dist=True)` is for it",
        control=True,
        resume=True,
    ),
    Known(
        "a parameter without a gradient under `ddp`",
        _all(_has("strategy", "ddp", "fused_ddp"), _has("module", "unused")),
        "parameters that were not used in producing the loss",
        "Lightning's: `ddp_find_unused_parameters_true` is for it",
        control=True,
        stops=True,
    ),
    Known(
        "a tied weight in reentrant checkpoints under `ddp`",
        _all(_has("strategy", "ddp", "fused_ddp"), _has("module", "tied"), _has("checkpointing", "reentrant")),
        "mark a variable ready only once",
        "torch's: its gradient arrives twice in one backward",
        control=True,
        stops=True,
        cell="strategy=ddp; checkpointing=reentrant; module=tied",
    ),
    Known(
        "`BackboneFinetuning` under `ddp`",
        _all(_has("strategy", "ddp", "fused_ddp", "layerwise_ddp"), _has("callback", "BackboneFinetuning")),
        "the processes have different parameters|^other: weights|^control: weights|were not used in producing",
        "torch's: what was frozen when the module was wrapped is not averaged; with `layerwise_ddp` it is",
        stops=True,
    ),
    Known(
        "statistics of BatchNorm in the second process, with accumulation",
        _all(_has("module", "BatchNorm"), _has("strategy", "ddp", "fused_ddp", "layerwise_ddp")),
        "^other: weights.*running",
        "layerwise.md#strategies: `layerwise_ddp` broadcasts them before every forward, `ddp` after those that step",
    ),
    Known(
        "clipping complex or sparse gradients by value",
        _all(_has("module", "complex", "sparse"), _has("clipping", "value", "tiny value")),
        "clamp is not supported for complex|'SparseCPU' backend",
        "torch's",
        control=True,
        stops=True,
    ),
    Known(
        "clipping sparse gradients by norm",
        _all(_has("module", "sparse"), _has("clipping", "norm", "tiny norm", "huge norm")),
        "'SparseCPU' backend",
        "torch's",
        control=True,
        stops=True,
    ),
    Known(
        "an embedding with `sparse=True` under FSDP2",
        _all(_has("module", "sparse"), _has("strategy", "layerwise_fsdp2")),
        "'SparseCPU' backend|CheckpointException",
        "torch's",
        control=True,
        stops=True,
    ),
    Known(
        "sparse gradients in float16",
        _all(_has("module", "sparse"), _has("precision", "16-true")),
        "not implemented for 'Half'",
        "torch's",
        control=True,
        stops=True,
    ),
    Known(
        "averages in bfloat16 or float16",
        _all(_has("callback", "EMA"), _has("precision", "bf16-true", "16-true")),
        "^split: (weights|optimizer).* apart",
        "Lightning's: the average is kept in float32, and in a checkpoint in the precision of the module",
        control=True,
        resume=True,
    ),
    Known(
        "complex parameters under loss scaling",
        _all(_has("module", "complex"), _has("precision", "16-mixed")),
        "not implemented for 'ComplexFloat'",
        "torch's: its GradScaler unscales real gradients",
        control=True,
        stops=True,
    ),
    Known(
        "complex parameters in a module of half precision",
        _all(_has("module", "complex"), _has("precision", "bf16-true", "16-true")),
        "view_as_real|fake tensor call|[Cc]omplex",
        "torch's: making a module bfloat16 leaves out the imaginary part",
        control=True,
        stops=True,
    ),
    Known(
        "BatchNorm over a view, compiled as one graph",
        _all(_has("module", "BatchNorm"), _has("compile", "whole")),
        "view size is not compatible",
        "torch's: tracing the backward takes the gradient for contiguous",
        control=True,
        stops=True,
    ),
    Known(
        "shards accumulated by `GradientAccumulationScheduler`",
        _all(_has("strategy", "layerwise_fsdp2"), _has("callback", "GradientAccumulationScheduler")),
        "^other: weights",
        "layerwise.md: FSDP2 reduces every micro-batch and layerwise their sum, which is rounded differently",
    ),
    Known(
        "`StochasticWeightAveraging` of a module with BatchNorm, validated within an epoch",
        _all(_has("callback", "SWA"), _has("module", "BatchNorm"), _has("flag", "val_check_interval")),
        "^other: weights",
        "Lightning's: the epoch for statistics steps once more, by the last gradients, which layerwise has freed",
        cell="strategy=layerwise; callback=SWA; flag=val_check_interval; module=BatchNorm",
    ),
    Known(
        "`LearningRateFinder` under FSDP2",
        _all(_has("strategy", "layerwise_fsdp2"), _has("callback", "LearningRateFinder")),
        "^CheckpointException",
        "Lightning's: what it saves before its trial has no rate of a schedule, and it asks for one afterwards",
        control=True,
        stops=True,
    ),
    Known(
        "`schedule_free_sgd` in bfloat16 with batches that grow",
        _all(_has("identifier", "schedule_free_sgd"), _has("callback", "BatchSizeFinder")),
        "a parameter is not finite",
        "the upstream class diverges alike",
        control=True,
        stops=True,
    ),
    Known(
        "clipping to next to nothing in float16",
        _all(_has("precision", "16-mixed"), _has("clipping", "tiny norm")),
        r"^control: weights.* is \d\.\d+e-1[4-6] apart",
        "the norm is a sum over the groups, which are others in plain Lightning",
        cell="identifier=rmsprop_bnb; precision=16-mixed; accumulation=2; clipping=tiny norm; module=channels_last",
    ),
    Known(
        "a parameter without a gradient in a distributed checkpoint",
        _all(_has("strategy", "layerwise_fsdp2"), _has("module", "unused")),
        "^split: CheckpointException",
        "torch's: it writes no state for what was never stepped, and asks for one when it reads",
        resume=True,
    ),
    Known(
        "statistics of BatchNorm in a distributed checkpoint",
        _all(_has("strategy", "layerwise_fsdp2"), _has("module", "BatchNorm")),
        "^split: weights.*running",
        "torch's: buffers are those of each process, and a checkpoint holds one of them",
        resume=True,
    ),
    Known(
        "a parameter without dimensions under FSDP2",
        _all(_has("strategy", "layerwise_fsdp2"), _has("module", "0-dim")),
        "doesn't support scalar parameters",
        "torch's: `fully_shard` splits along the first dimension",
        control=True,
        stops=True,
    ),
    Known(
        "a channels_last parameter under FSDP2",
        _all(_has("strategy", "layerwise_fsdp2"), _has("module", "channels_last")),
        "does not support non-contiguous parameters",
        "torch's",
        control=True,
        stops=True,
    ),
    Known(
        "`BackboneFinetuning` under FSDP2",
        _all(_has("strategy", "layerwise_fsdp2"), _has("callback", "BackboneFinetuning")),
        "^KeyError",
        "Lightning's: it looks for the parameters that were there before they were sharded",
        control=True,
        stops=True,
    ),
    Known(
        "`EMAWeightAveraging` under FSDP2",
        _all(_has("strategy", "layerwise_fsdp2"), _has("callback", "EMA")),
        "FSDP does not support deepcopy",
        "Lightning's: its callback copies the module",
        control=True,
        stops=True,
    ),
    Known(
        "`StochasticWeightAveraging` under FSDP2",
        _all(_has("strategy", "layerwise_fsdp2"), _has("callback", "SWA")),
        "mixed torch.Tensor and DTensor|SWA",
        "Lightning's: sharded models are not supported",
        control=True,
        stops=True,
    ),
    Known(
        "`StochasticWeightAveraging` of a module with BatchNorm, under loss scaling or clipped by value",
        _all(
            _has("callback", "SWA"),
            _has("module", "BatchNorm"),
            _any(_has("precision", "16-mixed"), _has("clipping", "value", "tiny value")),
        ),
        "No inf checks were recorded|nested_tensorlist",
        "Lightning's: the epoch that only updates statistics has no gradients to look at",
        control=True,
        stops=True,
        cell="clipping=value; callback=SWA; module=BatchNorm",
    ),
    Known(
        "checkpoints or early stopping in a barebones Trainer",
        _all(_has("flag", "barebones"), _has("callback", "ModelCheckpoint", "EarlyStopping")),
        "barebones=True|Early stopping conditioned on metric",
        "Lightning's: such a Trainer writes no checkpoints and logs nothing",
        control=True,
        stops=True,
    ),
    Known(
        "`BatchSizeFinder` with several processes",
        _all(_has("callback", "BatchSizeFinder"), _has("strategy", *sorted(DISTRIBUTED))),
        "not supported with distributed strategies",
        "Lightning's",
        control=True,
        stops=True,
    ),
    Known(
        "BatchNorm inside an activation checkpoint, where a backward measures first",
        _all(
            _has("module", "BatchNorm"),
            _has("checkpointing", "non-reentrant", "reentrant"),
            _any(_has("clipping", "norm", "tiny norm", "huge norm"), _has("strategy", "ddp", "layerwise_ddp")),
        ),
        "^other: weights.*running",
        "layerwise.md#clipping-by-norm: recomputing counts the batch, with any optimizer, and is done once more",
    ),
)


_STOPS = (*(row for row in REFUSED if not row.resume), *(row for row in EXCEPTIONS if row.stops))


def examples() -> list[Cell]:
    """Returns the cells that rows name."""
    return [Cell.parse(row.cell) for row in (*REFUSED, *EXCEPTIONS) if row.cell]


def clashes(cell: Cell) -> bool:
    """Whether the cell is refused, or known to end in an error."""
    return any(known.when(cell) for known in _STOPS)
