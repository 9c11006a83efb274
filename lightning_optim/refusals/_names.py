"""Names of optimizers and schedules, and the packages that they need."""

from __future__ import annotations

from lightning_optim.refusals._entry import Entry

ENTRIES = (
    Entry(
        "LO101",
        "unknown-optimizer",
        what="A name that is no identifier, no alias, no name of a plugin and no dotted path.",
        why="There is nothing to build. Nothing is guessed, but the text lists the names that come close.",
        do="Take one of `lightning-optim list`; a class of any package goes by its path, such as "
        "`optim='torch.optim.NAdam'`, and those of some packages by a short name, such as `'timm:lamb'`.",
        page="identifiers.md",
    ),
    Entry(
        "LO102",
        "not-a-name",
        what="An `optim` that is no string, such as a class or an optimizer that was built.",
        why="A name can be stored in a checkpoint, written in YAML and compared when a training goes on.",
        do="Pass the class's dotted path as a string. An optimizer that you build yourself belongs into "
        "`configure_optimizers`; `Trainer(strategy='layerwise')` or `OptimCallback()` take care of it there.",
        page="callbacks-and-manual.md",
    ),
    Entry(
        "LO103",
        "not-an-optimizer-class",
        what="A dotted path that cannot be imported, or that leads to something else than an optimizer class.",
        why="The path of a class is its module, a dot and its name at the top level of that module; pickles and "
        "checkpoints find it in the same way.",
        do="Try `python -c 'from package.module import Class'`, and write `package.module.Class`.",
        page="options.md#dotted-paths",
    ),
    Entry(
        "LO104",
        "unfit-constructor",
        what="A class by dotted path whose constructor takes no `lr`, takes arguments by position only, or has one "
        "whose "
        "name means something else here.",
        why="Options are passed by name, and the learning rate is an argument of its own.",
        do="Describe the class by a row and `lightning_optim.register`, or build it in `configure_optimizers`.",
        page="contributing.md",
    ),
    Entry(
        "LO105",
        "takes-model-or-optimizer",
        what="A class that takes the whole model, or another optimizer, in place of parameters.",
        why="A name and options do not build the other one.",
        do="Build it yourself in `configure_optimizers`. The text says what comes nearest by name.",
        page="other-optimizers.md",
    ),
    Entry(
        "LO106",
        "unknown-modes",
        what="A class that has to be switched between training and evaluation, and of which it is not known how to do "
        "so without loss.",
        why="Validation and checkpoints would have the wrong weights.",
        do="Use `schedule_free_adamw`, `schedule_free_radam`, `schedule_free_sgd` or `pytorch_optimizer:splus`.",
        page="schedule-free.md",
    ),
    Entry(
        "LO107",
        "missing-package",
        what="An identifier, an accelerator or a command whose package is not installed, too old, or known to be "
        "wrong.",
        why="Optional packages are not installed with lightning-optim. This is raised where the optimizer is built, so "
        "that a checkpoint can be loaded for inference without them.",
        do="Type the `pip install` of the text. `lightning-optim doctor` shows what can run here; "
        "`optim_fallback=True` takes the nearest identifier that can.",
        page="accelerators.md",
    ),
    Entry(
        "LO108",
        "unknown-schedule",
        what="An `lr_scheduler` that is not one of the schedules.",
        why="There is nothing to build.",
        do="Take one of the list in the text. A scheduler class of torch is built in `configure_optimizers`, together "
        "with `self.build_optimizer(self)`.",
        page="schedules.md#schedulers-of-torch",
    ),
    Entry(
        "LO109",
        "name-taken",
        what="`register` with a name that is registered, or that ends in `_layerwise`.",
        why="Every row has a layerwise form of that name already, and one name must mean one optimizer.",
        do="Choose another name.",
        page="contributing.md",
    ),
    Entry(
        "LO110",
        "untrusted-optimizer",
        what="An optimizer class that only a checkpoint names, and that your code has not imported.",
        why="To import a module is to run it, and a checkpoint may come from anybody.",
        do="If you trust the file, name the class yourself: `load_from_checkpoint(path, optim='package.Class')`, or "
        "import its module before.",
        page="checkpoints.md#loading-runs-nothing",
    ),
)
