"""What a decode step changes about a model for speed: three patches, each a `with` block that undoes itself.

`PackedProjections`: queries, keys and values as one matrix product. They are linear layers of one input. In a decode
step of a few rows such a product is bound by reading its weights, and small ones read slowly: a 4,096 x 4,096 bf16
matrix fills half an H100 and is split along the sum, with a second kernel to add the parts. Three take 60 microseconds
there, one product of all three takes 37. (Gate and up projection are left alone: 71 microseconds either way.) With
Llama-2-7B shapes, seven arms and 3,500 tokens a decode step on an H100 takes 1.260 times what reading weights and cache
at full bandwidth would; without packed projections 1.352 times, so they are worth 6.8 % of a step.

`CompiledLayers`: a step of a few rows spends much of its time in the model's small elementwise operations (RMSNorm,
rotary embedding, activation, residuals), each a kernel of its own; compiling the decoder layers fuses them. Attention
is one custom operation (`kvbench.runtime.cache`), so that a layer compiles whole.

`padded_head`: CPU libraries dislike some numbers of rows. With MKL on two AMD cores, SmolLM2's 49,152 x 576 output
matrix takes 11 ms for one row, 17 ms for four, five or eight, but 25, 37, 26 and 40 ms for two, three, six and seven
(fp32, medians of twelve): its kernels take rows in fours and do a remainder of two or three one at a time. Rows of
zeros cost nothing beside that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.functional import linear, pad
from transformers import PreTrainedModel

from kvbench.errors import ModelError
from kvbench.models.load import LoadedModel

GROUP = ("q_proj", "k_proj", "v_proj")
"""Names under which transformers keeps linear layers of one input."""
HEAD_ROWS = 4
MAX_CODES = 64  # versions of one function's compiled code: dtypes, one row or several, models of one process


# ---- projections of one input as one product -------------------------------------------------------------------------


class _Pack:
    """One group: its parameters as one, and the product of the input that came last."""

    def __init__(self, members: Sequence[nn.Linear]):
        self.members = list(members)
        self.weight = _side_by_side([member.weight for member in members])
        biases = [member.bias for member in members if member.bias is not None]
        self.bias = _side_by_side(biases) if biases else None
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
    """A model's groups of projections, each computed by one product in `active` blocks: equal up to the order of sums.

    Parameters keep their names, shapes and values; those of a group only come to lie next to each other in memory, and
    stay so. Linear layers of other classes (quantised, adapted) or with a `forward` of their own are left alone.
    """

    def __init__(self, model: nn.Module):
        with torch.inference_mode(False), torch.no_grad():
            self.packs = [_Pack(members) for parent in model.modules() if (members := _group(parent))]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Compute each group by one product until the block ends."""
        try:
            for pack in self.packs:
                before: tuple[Tensor, ...] = ()
                for member in pack.members:
                    vars(member).update(pack=pack, before=before, is_last=member is pack.members[-1])
                    member.__class__ = _PackedLinear
                    before = (*before, member.weight)
            yield
        finally:
            for pack in self.packs:
                pack.input = pack.output = None
                for member in pack.members:
                    member.__class__ = nn.Linear
                    for name in ("pack", "before", "is_last"):
                        vars(member).pop(name, None)


def _group(parent: nn.Module) -> list[nn.Linear]:
    """A module's children that one product can serve; none if it cannot."""
    members = [getattr(parent, name, None) for name in GROUP]
    plain = [m for m in members if isinstance(m, nn.Linear) and type(m) is nn.Linear and "forward" not in vars(m)]
    kinds = {(m.in_features, m.weight.dtype, m.weight.device, m.bias is None) for m in plain}
    fits = len(set(plain)) == len(GROUP) and len(kinds) == 1 and not plain[0].weight.is_meta
    return plain if fits else []


def _side_by_side(parameters: Sequence[Tensor]) -> Parameter:
    """One parameter over several of equal row shape, which become views of its storage unless they are already."""
    first, sizes = parameters[0], [len(parameter) for parameter in parameters]
    at, together = first.data_ptr(), True
    for parameter in parameters:
        together &= parameter.data_ptr() == at and parameter.is_contiguous()
        together &= parameter.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        at += parameter.nbytes
    if together:
        return Parameter(first.data.as_strided((sum(sizes), *first.shape[1:]), first.stride()), requires_grad=False)
    packed = torch.cat([parameter.data for parameter in parameters])
    for parameter, part in zip(parameters, packed.split(sizes), strict=True):
        parameter.data = part
    if packed.is_cuda:
        torch.cuda.empty_cache()  # what the parts have left is too small to hold the next group
    return Parameter(packed, requires_grad=False)


# ---- decoder layers as compiled code ---------------------------------------------------------------------------------


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that transformers names as the model's repeated blocks (`_no_split_modules`)."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def can_compile(loaded: LoadedModel) -> bool:
    """Whether compiling the layers is possible and of use: a GPU that holds the whole model, and known layers."""
    devices = {parameter.device for parameter in loaded.model.parameters()}
    return loaded.device.type == "cuda" and len(devices) == 1 and bool(decoder_layers(loaded.model))


class CompiledLayers:
    """A model's decoder layers and their compiled calls, which take effect in `active` blocks only.

    All layers share one code, made at the first step; a second object for the same kind of model finds it. The number
    of rows is symbolic: one code serves all batches, but a batch of one row has its own. Outside of `active` nothing of
    the model is changed but where its weights lie. `backend` is torch.compile's; `pack` adds `PackedProjections`.
    """

    def __init__(self, model: PreTrainedModel, backend: str | Callable[..., Any] = "inductor", pack: bool = True):
        self._name, self._layers = type(model).__name__, decoder_layers(model)
        self._packed = PackedProjections(model) if pack else None
        # Intermediate roundings to bfloat16 are kept, so that compiled and plain layers compute the same function.
        options: dict[str, Any] | None = {"emulate_precision_casts": True} if backend == "inductor" else None
        self._calls = []  # made once: `nn.Module.compile` takes a millisecond a layer
        for layer in self._layers:
            layer.compile(backend=backend, dynamic=True, options=options)
            self._calls.append(layer._compiled_call_impl)
            vars(layer).pop("_compiled_call_impl", None)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Run the layers as compiled code until the block ends; for decode steps, so one token a row."""
        from torch._dynamo import config as dynamo_config  # imported late: slow, and most processes do not need it
        from torch._dynamo.exc import TorchDynamoException

        try:
            # Without the first, every layer would get a code of its own: its index would be taken for a constant.
            with (
                dynamo_config.patch(allow_unspec_int_on_nn_module=True, recompile_limit=MAX_CODES),
                self._packed.active() if self._packed is not None else nullcontext(),
            ):
                for layer, call in zip(self._layers, self._calls, strict=True):
                    layer._compiled_call_impl = call
                yield
        except TorchDynamoException as error:
            cause = " ".join(str(error).split("\n\n")[0].split()) or type(error).__name__
            raise ModelError(
                f"torch.compile failed on the layers of {self._name} ({cause}): set engine.compile=false"
            ) from error
        finally:
            for layer in self._layers:
                vars(layer).pop("_compiled_call_impl", None)


# ---- the output matrix with a padded number of rows ------------------------------------------------------------------


@contextmanager
def padded_head(model: PreTrainedModel) -> Iterator[None]:
    """Let the output matrix see a multiple of `HEAD_ROWS` rows (the hidden states' first dimension) until the end.

    Logits keep their shape and meaning; single rows, the `(1, T, E)` of a prompt included, are left as they are.
    """
    head = model.get_output_embeddings()
    if head is None:
        yield
        return

    def fill_up(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = arguments[0]
        missing = -hidden.shape[0] % HEAD_ROWS
        if hidden.shape[0] == 1 or missing == 0:
            return arguments
        rows.append(hidden.shape[0])
        return pad(hidden, (0, 0) * (hidden.ndim - 1) + (0, missing)), *arguments[1:]

    def cut(module: nn.Module, arguments: tuple[Any, ...], logits: Tensor) -> Tensor:
        return logits[: rows.pop()] if rows else logits

    rows: list[int] = []
    hooks = [head.register_forward_pre_hook(fill_up), head.register_forward_hook(cut)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
