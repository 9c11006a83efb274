"""Checkpoints, and trainings that go on from them."""

from __future__ import annotations

from lightning_optim.refusals._entry import Entry

ENTRIES = (
    Entry(
        "LO801",
        "damaged-checkpoint",
        what="A checkpoint whose bytes have changed, or that is damaged otherwise.",
        why="Every byte is compared with the checksums that were written with it; the training would go on from wrong "
        "weights.",
        do="Take another checkpoint.",
        page="checkpoints.md#broken-and-foreign-files",
    ),
    Entry(
        "LO802",
        "unfinished-checkpoint",
        what="A checkpoint that is empty or truncated, or whose writing or replacement was interrupted.",
        why="A process was killed, or a disk was full.",
        do="Take another checkpoint. If the text names one beside it, rename that.",
        page="checkpoints.md#broken-and-foreign-files",
    ),
    Entry(
        "LO803",
        "folder-not-file",
        what="A folder where one file is needed.",
        why="Sharded trainings write a folder; `load_from_checkpoint` and one device read a file.",
        do="`lightning-optim consolidate FOLDER FILE` makes one.",
        page="sharded.md#checkpoints",
    ),
    Entry(
        "LO804",
        "no-checkpoint",
        what="A file that no Trainer has written: weights alone, an optimizer's state alone, or something else.",
        why="Lightning resumes from weights, optimizer, schedules and progress together.",
        do="Weights are read by `module.load_state_dict(torch.load(path))`, an optimizer's state by "
        "`migrate_state_dict`.",
        page="checkpoints.md#from-other-trainings",
    ),
    Entry(
        "LO805",
        "holds-code",
        what="A checkpoint that holds more than tensors and plain values.",
        why="To load such a thing is to run it. Nothing was run.",
        do="If you have written it yourself: `weights_only=False`.",
        page="checkpoints.md#loading-runs-nothing",
    ),
    Entry(
        "LO806",
        "another-optimizers-state",
        what="A state that another optimizer wrote, or another version of its format.",
        why="Its tensors would be read as something else.",
        do="Resume with the optimizer that wrote it, or start anew from the weights: "
        "`LitModel.load_from_checkpoint(path, optim=...)`.",
        page="checkpoints.md#another-optimizer",
    ),
    Entry(
        "LO807",
        "other-groups",
        what="A state that belongs to other param groups: other patterns, targets or frozen parameters.",
        why="Torch finds a state by its position, and would give it to another parameter.",
        do="Resume with the same arguments. `migrate_state_dict` gives each parameter its own.",
        page="checkpoints.md#another-optimizer",
    ),
    Entry(
        "LO808",
        "other-options",
        what="A state that was written with other options, or for parameters of other shapes.",
        why="It means something else with these.",
        do="Resume with the options and the model that wrote it, or start anew from the weights.",
        page="checkpoints.md#other-hyperparameters",
    ),
    Entry(
        "LO809",
        "another-schedule",
        what="A training that goes on with another `lr_scheduler` than the checkpoint's.",
        why="The learning rate would follow neither.",
        do="Resume with that one, or pass `override_on_resume=['lr_scheduler']` to change it from this step on.",
        page="schedules.md#another-schedule",
    ),
    Entry(
        "LO810",
        "override-without-effect",
        what="`override_on_resume` with what the constructor gives anyway, or a schedule with another state.",
        why="It would be ignored, or the state would be misread.",
        do="Leave it out of `override_on_resume`.",
        page="checkpoints.md#other-hyperparameters",
    ),
    Entry(
        "LO811",
        "within-a-step",
        what="A checkpoint that was written between micro-batches and whose gradients are not in it, or were divided "
        "by another `accumulate_grad_batches`; or within a step.",
        why="The first step would be another one.",
        do="Use the same `accumulate_grad_batches`, or resume from an earlier checkpoint.",
        page="checkpoints.md#between-micro-batches-and-when-training-is-interrupted",
    ),
    Entry(
        "LO812",
        "whose-state",
        what="`migrate_state_dict` where it is not known whose state is whose.",
        why="The other state dict has numbers, not names, or the shapes do not fit.",
        do="Pass what the other optimizer was given, in that order: `model.parameters()`, or its groups.",
        page="checkpoints.md#from-other-trainings",
    ),
    Entry(
        "LO813",
        "no-way-leads",
        what="`migrate_state_dict` between optimizers whose states have nothing in common, or that step other "
        "parameters.",
        why="A part of the state would be lost, or begin anew.",
        do="Freeze the same parameters for both, or start anew from the weights.",
        page="checkpoints.md#from-other-trainings",
    ),
    Entry(
        "LO814",
        "number-of-optimizers",
        what="A file with the states of another number of optimizers than there are.",
        why="It was saved by another training, or with `save_weights_only=True`.",
        do="Resume from a file of such a training, or start anew from its weights.",
        page="checkpoints.md",
    ),
    Entry(
        "LO815",
        "flattened-state",
        what="A state of bitsandbytes that `flatten_optimizer_state_dict=True` of torch.distributed.checkpoint made.",
        why="It loses what bitsandbytes nests.",
        do="Save and load with `StateDictOptions(flatten_optimizer_state_dict=False)`, the default.",
        page="sharded.md#checkpoints",
    ),
)
