"""Projections of the same input run as one matrix product, for a `with` block.

Queries, keys and values are linear layers of one input. In a decode step of a few rows such a product is bound by
reading its weights, and small ones read slowly: a 4,096 x 4,096 bf16 matrix fills half an H100 and is split along the
sum, with a second kernel to add the parts. Three take 60 microseconds there, one product of all three takes 37. (Gate
and up projection are left alone: 71 microseconds either way.)

    packed = PackedProjections(model)
    with packed.active():
        model(...)          # the same numbers up to the order of sums

The model's code stays as it is, and so do its parameters' names, shapes and values: those of a group only come to lie
next to each other in memory, where one tensor can view them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.functional import linear

GROUPS = (("q_proj", "k_proj", "v_proj"),)
"""Names under which transformers keeps linear layers of one input."""


class _Pack:
    """One group: its parameters as one, and the product of the input that came last."""

    def __init__(self, members: Sequence[nn.Linear]):
        self.members = list(members)
        self.weight = _side_by_side([member.weight for member in members])
        biases = [member.bias for member in members if member.bias is not None]
        self.bias = _side_by_side(biases) if biases else None
        self.forget()

    def forget(self) -> None:
        """Let go of input and product."""
        self.input: Tensor | None = None
        self.output: Tensor | None = None


class _PackedLinear(nn.Linear):
    """A member of a group, for the time of a block: takes its columns of the group's product."""

    pack: _Pack
    before: tuple[Tensor, ...]
    is_last: bool

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear`; the first member to see an input computes for all, the last lets go of it."""
        pack = self.pack
        if pack.input is not input:
            pack.input, pack.output = input, linear(input, pack.weight, pack.bias)
        output = pack.output
        assert output is not None
        first = sum(weight.shape[0] for weight in self.before)
        if self.is_last:
            pack.input = pack.output = None
        return output[..., first : first + self.weight.shape[0]]


class PackedProjections:
    """A model's groups of projections, computed together in `active` blocks only.

    Making one moves the weights of each group next to each other, once per model, group by group.

    Args:
        model: the model; linear layers of other classes (quantised, adapted) or with a `forward` of their own are left
            alone.
    """

    def __init__(self, model: nn.Module):
        with torch.inference_mode(False), torch.no_grad():
            self._packs = [_Pack(members) for parent in model.modules() for members in _groups(parent)]

    @property
    def n_groups(self) -> int:
        """Groups found."""
        return len(self._packs)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Compute each group by one product until the block ends.

        Yields:
            Nothing.
        """
        try:
            for pack in self._packs:
                before: tuple[Tensor, ...] = ()
                for member in pack.members:
                    vars(member).update(pack=pack, before=before, is_last=member is pack.members[-1])
                    member.__class__ = _PackedLinear
                    before = (*before, member.weight)
            yield
        finally:
            for pack in self._packs:
                pack.forget()
                for member in pack.members:
                    member.__class__ = nn.Linear
                    for name in ("pack", "before", "is_last"):
                        vars(member).pop(name, None)


def _groups(parent: nn.Module) -> Iterator[list[nn.Linear]]:
    """The groups among a module's children that one product can serve."""
    for names in GROUPS:
        members = [getattr(parent, name, None) for name in names]
        plain = [m for m in members if isinstance(m, nn.Linear) and type(m) is nn.Linear and "forward" not in vars(m)]
        if len(plain) < len(names):
            continue
        kinds = {(m.in_features, m.weight.dtype, m.weight.device, m.bias is None) for m in plain}
        if len(kinds) == 1 and not plain[0].weight.is_meta and len(set(plain)) == len(plain):
            yield plain


def _side_by_side(parameters: Sequence[Tensor]) -> Parameter:
    """One parameter over several of equal row shape, which become views of its storage unless they are already."""
    first = parameters[0]
    sizes = [len(parameter) for parameter in parameters]
    at, together = first.data_ptr(), True
    for parameter in parameters:
        together &= parameter.data_ptr() == at and parameter.is_contiguous()
        together &= parameter.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        at += parameter.nbytes
    if together:
        shape = (sum(sizes), *first.shape[1:])
        return Parameter(first.data.as_strided(shape, first.stride()), requires_grad=False)
    packed = torch.cat([parameter.data for parameter in parameters])
    for parameter, part in zip(parameters, packed.split(sizes), strict=True):
        parameter.data = part
    if packed.is_cuda:
        torch.cuda.empty_cache()  # what the parts have left is too small to hold the next group
    return Parameter(packed, requires_grad=False)
