"""Which matrices of a model are hidden: the weights between its embeddings and its output layer.

Optimizers that orthogonalize an update (Muon) are for these. Embeddings are lookup tables, of which a batch touches a
few rows, and the rows of an output layer are classes: both are left to an elementwise optimizer, as are vectors. Others
(SCALE) step all matrices, but treat those two in a way of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from lightning_optim.errors import InvalidParamGroups
from lightning_optim.groups._parameters import NamedParameter
from lightning_optim.groups._target_modules import TargetModules, matrices
from lightning_optim.table import Role

# What output layers are called.
_NAMES = frozenset(
    {"head", "heads", "lm_head", "classifier", "fc", "score", "output", "out", "logits", "embed_out", "to_logits"}
)

_SETTLES = "optim_target_modules settles it"


@dataclass(frozen=True)
class Hidden:
    """The matrices of a model that an optimizer takes.

    Attributes:
        stack_dims: The number of leading dimensions that only count matrices, by the parameter's id.
        remark: How the output layer was found, for the report.
        roles: Which of them are not hidden, by id.
    """

    stack_dims: dict[int, int]
    remark: str
    roles: dict[int, Role] = field(default_factory=dict)


def hidden_matrices(
    parameters: Sequence[NamedParameter], target_modules: TargetModules, model: Sequence[NamedParameter] = ()
) -> Hidden:
    """Returns the hidden matrices: of linear layers and convolutions, and stacks of matrices such as experts.

    The output layer is the first of these that exists: what ``get_output_embeddings()`` of a module returns; the last
    linear layer with as many outputs as the largest embedding has rows; the last one outside of numbered blocks with a
    usual name (``head``, ``classifier``, ``fc`` ...); the last linear layer, unless it is the only matrix. With a
    weight tied to an embedding there is no other. Where none of the first three is trained but one is frozen, that is
    the output layer, and every matrix that is trained is hidden.

    Args:
        parameters: All that are trained, in the order of registration.
        target_modules: What to take instead, as for optimizers that project; ``None`` finds it as above.
        model: All parameters, frozen ones among them; ``()`` if none is frozen.

    Raises:
        InvalidParamGroups: If there is no hidden matrix, or ``target_modules`` names none.
    """
    found = matrices(parameters, target_modules)
    if target_modules is not None:
        return Hidden(found, "the matrices that optim_target_modules names")
    output, remark = _output_layer(parameters, model or parameters, found)
    if output is not None:
        found.pop(id(output.parameter), None)
    if not found:
        raise InvalidParamGroups(
            "the model has no hidden matrix: no weight of a linear layer or a convolution besides "
            f"{output.name if output else 'embeddings'!r}, which is {remark}. Name what to take by "
            "optim_target_modules, or use an optimizer for all parameters, such as optim='adamw_torch'",
            code="LO315",
        )
    return Hidden(found, remark)


def all_matrices(parameters: Sequence[NamedParameter], model: Sequence[NamedParameter] = ()) -> Hidden:
    """Returns the hidden matrices, the embeddings and the output layer, which is found as above.

    A weight tied to an embedding is an output layer.

    Raises:
        InvalidParamGroups: If there is no matrix.
    """
    found = matrices(parameters)
    output, remark = _output_layer(parameters, model or parameters, found)
    roles: dict[int, Role] = {}
    for parameter in parameters:
        if parameter is output or _is_tied(parameter):
            roles[id(parameter.parameter)] = "output"
        elif parameter.is_embedding:
            roles[id(parameter.parameter)] = "embedding"
    taken = {id(p.parameter): found.get(id(p.parameter), 0) for p in parameters if id(p.parameter) in {*found, *roles}}
    if not taken:
        raise InvalidParamGroups(
            "the model has no matrix: no weight of a linear layer, a convolution or an embedding. Use an optimizer for "
            "all parameters, such as optim='adamw_torch'",
            code="LO315",
        )
    return Hidden(taken, remark.replace(f"; {_SETTLES}", ""), roles)


def _is_tied(parameter: NamedParameter) -> bool:
    return parameter.is_embedding and any(isinstance(owner, nn.Linear) for owner in parameter.owners)


def _output_layer(
    parameters: Sequence[NamedParameter], model: Sequence[NamedParameter], found: dict[int, int]
) -> tuple[NamedParameter | None, str]:
    """Returns the output layer if it is trained and not tied, and how it was found."""
    declared = [p for p in parameters if p.is_output]
    if declared:
        return declared[-1], f"the output layer is {declared[-1].name!r}, says get_output_embeddings()"
    if any(map(_is_tied, parameters)):
        return None, "the output layer is tied to an embedding"
    rows = max((p.parameter.shape[0] for p in model if p.is_embedding), default=None)
    for candidates, reason in _signs(_linear(parameters), rows):
        if candidates:
            others = [p.name for p in candidates[:-1]]
            rivals = f", and so have {', '.join(map(repr, others))}, which are taken for hidden" if others else ""
            return candidates[-1], _taken(candidates[-1], f"{reason}{rivals}")
    trained = {id(p.parameter) for p in parameters}
    frozen = [p for p in model if id(p.parameter) not in trained]
    for candidates, reason in (
        ([p for p in frozen if p.is_output], "get_output_embeddings() says so"),
        ([p for p in frozen if _is_tied(p)], "it is tied to an embedding"),
        *_signs(_linear(frozen), rows),
    ):
        if candidates:
            return None, _taken(candidates[-1], f"{reason}, and it is frozen")
    for last in _linear(model)[-1:]:
        if id(last.parameter) not in trained:
            return None, _taken(last, "it is the last linear layer, and it is frozen")
        if len(found) > 1:
            return last, _taken(last, "it is the last linear layer")
    return None, "no output layer is found"


def _signs(linear: list[NamedParameter], rows: int | None) -> Iterator[tuple[list[NamedParameter], str]]:
    """Yields the linear layers that look like an output layer, the surest sign first, and the sign."""
    yield [p for p in linear if p.parameter.shape[0] == rows], f"it has as many outputs as the embedding rows ({rows})"
    yield [p for p in linear if _is_called_output(p.name)], "it has an output layer's name"


def _taken(layer: NamedParameter, reason: str) -> str:
    return f"{layer.name!r} is taken for the output layer: {reason}; {_SETTLES}"


def _linear(parameters: Sequence[NamedParameter]) -> list[NamedParameter]:
    found = matrices(parameters)
    return [p for p in parameters if id(p.parameter) in found and isinstance(_owner(p), nn.Linear)]


def _owner(parameter: NamedParameter) -> nn.Module | None:
    return parameter.owners[0] if parameter.owners else None


def _is_called_output(name: str) -> bool:
    path = name.split(".")[:-1]
    return bool(path) and path[-1] in _NAMES and not any(part.isdigit() for part in path)
