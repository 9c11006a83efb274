"""Estimates, comparisons, conversions and checks."""

from __future__ import annotations

from lightning_optim.refusals._entry import Entry

ENTRIES = (
    Entry(
        "LO901",
        "estimate-arguments",
        what="Arguments of an estimate of memory that do not fit together: a batch for a shape, devices for a "
        "strategy, "
        "the sizes of a shape.",
        why="They do not describe a training.",
        do="Change what the text names.",
        page="memory.md",
    ),
    Entry(
        "LO902",
        "unknown-shape",
        what="The name of a model shape that is not known.",
        why="Its sizes are not known here, and nothing is downloaded.",
        do="Take one of those in the text, or give sizes: `Shape(...)`.",
        page="memory.md#shapes",
    ),
    Entry(
        "LO903",
        "estimate-in-a-group",
        what="An estimate for several devices in a process that belongs to a process group.",
        why="It is made in a group of its own.",
        do="Estimate before it is made, or after `torch.distributed.destroy_process_group()`.",
        page="memory.md#several-devices",
    ),
    Entry(
        "LO904",
        "cannot-be-estimated",
        what="A module whose step cannot be followed without values: manual optimization, a branch on a loss, "
        "something "
        "that cannot be copied, no sharding.",
        why="Nothing is allocated in an estimate.",
        do="Say what the loss is: `loss=lambda module, batch: ...`, or estimate with `batch=None`.",
        page="memory.md#your-own-module",
    ),
    Entry(
        "LO905",
        "estimate-strategy",
        what="An estimate with a strategy that cannot step the optimizer.",
        why="It would be refused when trained, too.",
        do="Use the strategy that the text names.",
        page="memory.md#several-devices",
    ),
    Entry(
        "LO906",
        "nothing-fits",
        what="A recommendation where nothing fits, or where no claim speaks for what fits.",
        why="Only what the evidence names is recommended.",
        do="`lightning-optim memory --fits` shows all that fit; less memory is needed with activation checkpointing, "
        "16 bits, or sharding.",
        page="choosing.md",
    ),
    Entry(
        "LO907",
        "bench-request",
        what="A comparison that cannot be made: one optimizer alone, too few seeds, a configuration that cannot be "
        "read.",
        why="It would tell nothing, or nothing could be run.",
        do="Change what the text names.",
        page="bench.md",
    ),
    Entry(
        "LO908",
        "bench-output",
        what="An `--output` of `lightning-optim bench` that cannot be written, or holds something else.",
        why="Measurements of another request cannot be compared.",
        do="Take another `--output`, or delete the file.",
        page="bench.md",
    ),
    Entry(
        "LO909",
        "convert-source",
        what="A file that `lightning-optim convert` or `OptimConfig.from_transformers` cannot read, or values in it "
        "that "
        "mean nothing.",
        why="It holds no arguments of the Trainer, or is a pickle, which would be run.",
        do="Write the arguments as JSON or YAML: `TrainingArguments.to_json_string()`.",
        page="migrating.md",
    ),
    Entry(
        "LO910",
        "check-subject",
        what="`check_optimizer` with something that is no identifier, dotted path, class or row.",
        why="There is nothing to check.",
        do="Name one of these.",
        page="checking.md",
    ),
)
