"""The contracts between qframe and its plugins: Protocols and the dataclasses they exchange.

Tensors are `torch.Tensor` on the CPU, float32 and contiguous unless said otherwise. Shapes use
the field's words: a linear layer has `rows` outputs and `columns` inputs, its weight is
[rows, columns]. This module imports neither torch nor numba, so that listing plugins is quick.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    import numpy as np
    import torch

    from qframe.kv_scheme import KVScheme
    from qframe.scheme import Scheme
    from qframe.stored import StoredLayer
    from qframe.stored_model import StoredModel
    from qframe.transforms import Rotation
    from qframe.weights import ModelFolder


# What the host knows about a layer ------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerInfo:
    """One linear layer y = W x + b of the network.

    name      its dotted module name, e.g. "model.layers.0.self_attn.q_proj"
    rows      outputs of the layer
    columns   inputs of the layer
    kind      the class name of the module, e.g. "Linear"
    """

    name: str
    rows: int
    columns: int
    kind: str = "Linear"

    @property
    def size(self) -> int:
        """The number of weights."""
        return self.rows * self.columns


@dataclass(frozen=True, slots=True, kw_only=True)
class InputGroup:
    """Layers that read the very same input tensor, such as q_proj, k_proj and v_proj.

    Statistics are collected once for all of them, and a rewrite that changes the input changes
    it for all of them.
    """

    layers: tuple[LayerInfo, ...]

    @property
    def name(self) -> str:
        """The name of the first layer, which stands for the group."""
        return self.layers[0].name

    @property
    def columns(self) -> int:
        """The width of the common input."""
        return self.layers[0].columns


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a plugin can do. The host refuses the rest before any work is done.

    None means "any". A capability is a promise: the conformance suite checks that what is
    declared works, and that what is not declared raises `UnsupportedError`.
    """

    num_bits: frozenset[int] | None = None
    types: frozenset[str] = frozenset({"int"})
    scale_dtypes: frozenset[str] = frozenset({"float32", "float16", "bfloat16"})
    strategies: frozenset[str] = frozenset({"tensor", "channel", "group"})
    symmetric: frozenset[bool] = frozenset({True, False})
    quantized_inputs: frozenset[bool] = frozenset({True, False})
    deterministic: bool = True
    row_independent: bool = True

    @classmethod
    def any_format(cls, **fields: Any) -> Self:
        """Return those of a plugin that works with integers, floats and scales of every kind."""
        scales = frozenset({"float32", "float16", "bfloat16", "e8m0", "e4m3"})
        return cls(types=frozenset({"int", "float"}), scale_dtypes=scales, **fields)

    def objection(self, scheme: Scheme | KVScheme) -> str | None:
        """Return why `scheme` is not supported, or None when it is."""
        wanted: tuple[tuple[str, object, frozenset[Any] | None], ...] = (
            ("num_bits", scheme.num_bits, self.num_bits),
            ("type", scheme.type, self.types),
            ("scale_dtype", scheme.scale_dtype, self.scale_dtypes),
            ("strategy", scheme.strategy, self.strategies),
            ("symmetric", scheme.symmetric, self.symmetric),
        )
        for parameter, value, allowed in wanted:
            if allowed is not None and value not in allowed:
                return f"{parameter}={value!r} is not supported (supported: {sorted(allowed)})"
        quantized = getattr(scheme, "input_activations", None) is not None
        if quantized not in self.quantized_inputs:
            which = "without" if quantized else "with"
            return f"only schemes {which} input_activations are supported"
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something a user should know about: a fallback, an escalated damping, an untied weight."""

    kind: str
    layer: str
    message: str


# Number formats -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Grid:
    """The values that exist at scale 1.

    Code c in [qmin, qmax] stands for the value c when `values` is None (an integer grid), else
    for `values[c - qmin]` (ascending).

    >>> Grid(-8, 7).levels
    16
    >>> Grid.of([-1.0, 0.0, 0.5, 1.0])
    Grid(qmin=-1, qmax=2, values=(-1.0, 0.0, 0.5, 1.0))
    """

    qmin: int
    qmax: int
    values: tuple[float, ...] | None = None

    @classmethod
    def of(cls, values: Iterable[float]) -> Self:
        """Return the grid of some values, ascending and with 0 among them, which gets code 0."""
        every = tuple(float(value) for value in values)
        below = sum(value < 0 for value in every)
        return cls(-below, len(every) - below - 1, every)

    @property
    def levels(self) -> int:
        """How many codes there are."""
        return self.qmax - self.qmin + 1

    @property
    def reach(self) -> float:
        """How many scales the largest weight of a symmetric group is; 0 or less where none fits.

        Half of the range of integers, so that the full grid ends half a step before its largest
        weight; of values the nearer end, so that nothing lies beyond either.
        """
        if self.values is None:
            return (self.qmax - self.qmin) / 2
        return min(self.values[-1], -self.values[0])

    @property
    def mirrored(self) -> bool:
        """Whether it is its own mirror image, and -c stands for the negative of what c does."""
        if self.qmin != -self.qmax:
            return False
        values = self.values
        return values is None or values == tuple(-value for value in reversed(values))


class NumberFormat(Protocol):
    """A number format: which values exist.

    name       what a scheme's `format` names: "nf4"; or type and bits, "int4", for schemes that
               name none
    type       "int", codes stand for themselves; or "float", they stand for the grid's `values`
    num_bits   bits of a stored code
    """

    name: str
    type: str
    num_bits: int

    def grid(self, *, symmetric: bool, scale_rule: str) -> Grid:
        """Return the grid of codes for symmetric or asymmetric use.

        Raises UnsupportedError for a use that the format does not have.
        """
        ...


# Calibration ----------------------------------------------------------------------------------


class Statistic(Protocol):
    """What an observer collects at one input group: an additive monoid.

    `merge` makes it the same to see all tokens in one place or to see parts of them in several
    and merge: up to the order of summation, merge(a, b) == having seen both.

    It is sent between processes: its attributes are tensors, arrays, numbers and texts, lists and
    mappings of such, objects with such attributes, or what one that is new has as well.
    """

    def update(self, x: torch.Tensor) -> None:
        """Take in activations x [tokens, columns], float32. Must not change x."""
        ...

    def merge(self, other: Self) -> None:
        """Take in what `other` has seen."""
        ...

    def value(self) -> Any:
        """Return the statistic, in the form that the observer's docstring promises."""
        ...


class Observer(Protocol):
    """Decides which statistic of a layer's inputs is collected during calibration.

    One whose value says how far a stored scale of activations has to reach, [1] float32, has an
    attribute `finds_reach`, which is True: the largest |x| that is not to be clipped, 0 for none.
    Such a one may be a frozen dataclass with a field `grid`: it is given that of the codes.

    One that looks at how far inputs have moved has an attribute `pairs`, which is True. Its
    statistic is given x [tokens, 2 columns]: inputs in the quantized network, and beside them those
    of the same tokens in the network that is not quantized. That costs a second forward pass.
    """

    name: str

    def start(self, group: InputGroup) -> Statistic:
        """Return an empty statistic for the inputs of one group of layers."""
        ...


# Rewriting ------------------------------------------------------------------------------------


def as_it_is(scale: torch.Tensor) -> torch.Tensor:
    """Return the scale: where nothing before the layers can divide by it."""
    return scale


@dataclass(frozen=True, slots=True, kw_only=True)
class RewriteProblem:
    """Rewrite the layers that read one input tensor, together.

    layers     layer name -> its rounding problem as it stands. All have the same columns, and the
               same statistics: those of the observers named in the handler's `needs`. Do not change
               a weight.
    foldable   input scale [columns] -> the one that it becomes where a module before the layers
               can divide by it, as nearly as that module's dtype allows; elsewhere the same. A
               handler that compares scales should compare these: whatever it returns becomes one.
    """

    layers: Mapping[str, RoundingProblem]
    foldable: Callable[[torch.Tensor], torch.Tensor] = as_it_is

    @property
    def name(self) -> str:
        """The name of the first layer, for messages."""
        return next(iter(self.layers))

    @property
    def columns(self) -> int:
        """The width of the input."""
        return int(self.layers[self.name].weight.shape[1])

    @property
    def weights(self) -> Mapping[str, torch.Tensor]:
        """Layer name -> weight, [rows, columns] float32."""
        return {name: layer.weight for name, layer in self.layers.items()}

    @property
    def statistics(self) -> Mapping[str, Any]:
        """Observer name -> value."""
        return self.layers[self.name].statistics

    @property
    def tokens(self) -> int:
        """Calibration tokens behind the statistics (0 for a data-free run)."""
        return self.layers[self.name].tokens

    def scaled(self, input_scale: torch.Tensor) -> Rewrite:
        """Return the rewrite that multiplies every column by its scale, [columns]."""
        weights = {name: weight * input_scale for name, weight in self.weights.items()}
        return Rewrite(weights=weights, input_scale=input_scale)

    def rotated(self, rotation: Rotation) -> Rewrite:
        """Return the rewrite that rotates weights and input alike."""
        weights = {name: rotation.apply(weight) for name, weight in self.weights.items()}
        return Rewrite(weights=weights, input_scale=self._unscaled(), rotation=rotation)

    def keeping(self, columns: torch.Tensor) -> Rewrite:
        """Return the rewrite that keeps these columns [k] int64, ascending, in 16 bits."""
        if not len(columns):
            return Rewrite(weights=dict(self.weights), input_scale=self._unscaled())
        weights = {name: w.index_fill(1, columns, 0.0) for name, w in self.weights.items()}
        share = len(columns) / max(self.columns, 1)
        info = {"kept_columns": len(columns), "kept_share": share}
        return Rewrite(weights=weights, input_scale=self._unscaled(), kept=columns, info=info)

    def leaving(self, threshold: float) -> Rewrite:
        """Return the rewrite that leaves inputs alone whose column reaches a threshold; 0: none."""
        scale, weights = self._unscaled(), dict(self.weights)
        return Rewrite(weights=weights, input_scale=scale, threshold=threshold or None)

    def _unscaled(self) -> torch.Tensor:
        return self.layers[self.name].weight.new_ones(self.columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewrite:
    """W x = W' z + (W z of the kept columns), z = rotate(x / input_scale), exactly in real numbers.

    weights       layer name -> rewritten weight W' [rows, columns], 0 in the columns that are kept
    input_scale   [columns], positive and finite: what the input is divided by at run time
    rotation      how it is rotated after that; None: not at all
    kept          [k] int64, ascending: columns whose weights, as the handler was given them, are
                  multiplied in 16 bits and take no part in any rounding; None for none
    threshold     at run time columns in which any |z| of a call reaches it are not rounded, though
                  activations are; None: all are. It changes no weight
    info          what the report should show, e.g. {"alpha": 0.5}
    """

    weights: Mapping[str, torch.Tensor]
    input_scale: torch.Tensor
    rotation: Rotation | None = None
    kept: torch.Tensor | None = None
    threshold: float | None = None
    info: Mapping[str, float | int | str] = field(default_factory=dict)


class OutlierHandler(Protocol):
    """Rewrites the layers of an input group so that outliers do no harm.

    One that rotates has an attribute `rotates`, which is True; one that keeps columns, or leaves
    inputs alone at run time, has `keeps`. So what is stored, and in which order they may stand, is
    known before.
    """

    name: str
    needs: frozenset[str]
    capabilities: Capabilities

    def rewrite(self, problem: RewriteProblem, rng: np.random.Generator) -> Rewrite:
        """Return the rewritten weights and what the input is divided by."""
        ...


# Rounding -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundingProblem:
    """Give every weight of one layer a code.

    name         the layer's name, for messages
    weight       [rows, columns] float32, finite. Do not change it.
    scheme       num_bits, symmetric, strategy, group_size, ...
    grid         the codes that exist: scheme's qmin, qmax
    input_grid   the codes of activations, where the scheme quantizes them
    statistics   observer name -> value, for the observers named in the rounder's `needs`
    tokens       calibration tokens behind the statistics (0 for a data-free run)
    held_out     the same of tokens that are kept aside: to choose between candidates, never to fit
                 one. Empty where none are
    """

    name: str
    weight: torch.Tensor
    scheme: Scheme
    grid: Grid
    input_grid: Grid | None = None
    statistics: Mapping[str, Any] = field(default_factory=dict)
    tokens: int = 0
    held_out: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeight:
    """The codes of a layer and what they mean: w = scale * (code - zero_point).

    On a grid with `values` w = scale * values[code - qmin].

    codes         [rows, columns] int16, each in [qmin, qmax]
    scale         [rows or 1, groups] float32, > 0, already rounded to the scheme's scale_dtype
    zero_point    like scale, int16, in [qmin, qmax]; all zero for symmetric schemes
    grid          the problem's, where it has `values`; None where codes stand for themselves
    global_scale  [1] float32, of the whole tensor: scales are numbers of scale_dtype "e4m3" times
                  this one (`qframe.rounding.tensor_scale`); None for other dtypes
    group_index   [columns] int32: which group a column belongs to, usually column // group_size
    order         [columns] int32: the order in which columns were rounded; None for left to right
    info          what the report should show, e.g. {"damp": 0.01}
    events        fallbacks and the like
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor
    group_index: torch.Tensor
    grid: Grid | None = None
    global_scale: torch.Tensor | None = None
    order: torch.Tensor | None = None
    info: Mapping[str, float | int | str] = field(default_factory=dict)
    events: tuple[Event, ...] = ()


class Rounder(Protocol):
    """Decides which code each weight gets.

    A rounder that is a frozen dataclass has options for free: its fields, their defaults and
    their types. `--set dampening_frac=0.1` and a recipe's `options` are checked against them.

    name           what users type after -m
    needs          names of the observers whose statistics `round` reads; empty for data-free
    capabilities   which schemes it can do

    One whose groups are not columns that follow one another has an attribute `orders_groups`, which
    is True. One that needs no statistics and whose rows are independent may have an attribute
    `by_rows`, which is True: then it may be given some rows of a layer at a time, which is faster
    and takes little memory (`qframe.panels`).
    """

    name: str
    needs: frozenset[str]
    capabilities: Capabilities

    def round(self, problem: RoundingProblem, rng: np.random.Generator) -> QuantizedWeight:
        """Return codes for problem.weight. Use `rng` for any randomness, never a global one."""
        ...


# Kernels, caches, exporters -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OpCall:
    """A call that a kernel may or may not be able to serve.

    op       one of `qframe.kernels.OPS`
    device   where the operands are: "cpu", "cuda", "cuda:1", ...
    dtype    of activations, one of `qframe.kernels.ACTIVATIONS`: "float32", "bfloat16", "float16"
    scheme   of the weight; (keys', values') for attention_kv; None where neither plays a part
    shape    sizes, in the order of the operation's `Op.call`
    """

    op: str
    device: str
    dtype: str
    scheme: Scheme | tuple[KVScheme, KVScheme] | None
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Unsupported:
    """Why a kernel cannot serve a call, in words for the user."""

    reason: str


class Kernel(Protocol):
    """Computes one operation on one backend, e.g. op "linear_weight_only" on "numba".

    `qframe.kernels.OPS` says which operands each operation has and what it returns. A kernel may
    have more attributes, each a declaration that the conformance suite holds it to:

    prepare             a method that lays out the constant operands once; what it returns takes
                        their place in the call
    from_activations    of linear_int8 and linear_int8_groups, a method that takes activations
                        [tokens, columns] in the place of codes and scales, and makes them itself:
                        the same bits as for the codes that quantize_activations makes, a scale
                        absmax / 127 and codes that are rounded quotients; with activations of 16
                        bits, where `supports` says so, rounded to their dtype
    activations         the dtypes of activations that it takes, of `qframe.kernels.ACTIVATIONS`,
                        as `supports` says, too; "float32" alone unless it says otherwise
    device              where its operands must be; "cpu" unless it says otherwise
    priority            an integer: of several that serve a call, the one with the highest is taken
                        where none is asked for by name; 0
    absent              a method that returns None, or `Unsupported` with the reason why it cannot
                        run on this machine at all, as for want of a device
    by_name_only        whether it is taken only where its backend is asked for by name, as one that
                        simulates another machine; False
    accumulator         how it adds up, a word of `qframe.kernels.ARITHMETICS`; "float32"
    depth               of linear_weight_only and hessian_update: a method that takes the operands
                        of a call, name -> array, and returns how many roundings of the sums a
                        product passes at most; without it, the bound is that of any order
    deterministic       whether it gives the same bits every time; True
    token_independent   whether a token alone gets the bits that it gets among others; False
    variants            name -> the same kernel run otherwise, such as with another order of
                        threads, that gives the same bits; none
    targets             name -> the same kernel compiled for another machine, such as "sm_90"; none
    dense               of hadamard: whether it multiplies with the matrix as it is, without
                        butterflies; False
    """

    op: str
    backend: str

    def supports(self, call: OpCall) -> Unsupported | None:
        """Return None when the call can be served, else the reason why not."""
        ...

    def __call__(self, *operands: Any) -> Any:
        """Compute. Operands may have any strides, and must not be changed unless the op says so.

        Raises UnsupportedError for operands that `supports` could not know of, such as groups that
        are not neighbouring columns.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class KVBlock:
    """Neighbouring tokens of a KV cache that are stored as codes: x = scale * code + offset.

    start    the first of the tokens; how many there are is in the shape of the codes
    codes    [batch, heads, tokens, head_dim] int16, each in [qmin, qmax] of the scheme's grid
    scale    float32, > 0, already rounded to the scheme's scale_dtype. Axis "token": [batch, heads,
             tokens, groups], channel c has group c // group_size. Axis "channel": [batch, heads,
             groups, head_dim], the block's token t has group t // group_size
    offset   like scale; what code 0 stands for. All zero for symmetric schemes
    """

    start: int
    codes: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor

    @property
    def stop(self) -> int:
        """The token after the last one."""
        return self.start + int(self.codes.shape[2])


class KVStore(Protocol):
    """The keys, or the values, of one layer: tokens go in and come out as what is stored of them.

    Its first append says batch, heads, head_dim and dtype; all later ones must have the same. A
    lane is one head of one sequence. Nothing it returns may change later, nor be changed through.

    length   tokens in it
    nbytes   bytes of all memory it holds; a buffer that is larger than its use counts in full
    """

    length: int
    nbytes: int

    def append(self, x: torch.Tensor) -> None:
        """Take in x [batch, heads, tokens, head_dim], of float32, float16 or bfloat16.

        Raises NonFiniteError for a NaN or an infinity, ValueError for another shape or dtype than
        before; then nothing is changed. Must neither change x nor keep hold of its memory.
        """
        ...

    def read(self) -> torch.Tensor:
        """Return all tokens [batch, heads, length, head_dim], in the dtype that was appended.

        A token that is in no block comes back with the bits with which it came.
        """
        ...

    def blocks(self) -> Sequence[KVBlock]:
        """Return what is stored as codes, from left to right."""
        ...

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens; the others read as before.

        Raises ValueError for a length outside [0, self.length].
        """
        ...

    def select(self, indices: torch.Tensor) -> None:
        """Make the batch that of `indices` [new batch] int64: in any order, left out or repeated.

        This serves beam search (reorder), and to keep or to repeat sequences. Raises ValueError
        for an index outside [0, batch).
        """
        ...


class KVCacheQuantizer(Protocol):
    """Stores keys and values of a generating model in few bits.

    A quantizer that is a frozen dataclass has options for free, as a `Rounder` has.

    capabilities   which schemes it can do: `strategies` are axes, "token" and "channel"; a "row" in
                   `row_independent` is a lane, one head of one sequence
    """

    name: str
    capabilities: Capabilities

    def start(self, kind: str, scheme: KVScheme, rng: np.random.Generator) -> KVStore:
        """Return an empty store for one layer's keys (kind "key") or values ("value").

        Use `rng` for any randomness, never a global one.
        """
        ...

    def nbytes(self, scheme: KVScheme, shape: tuple[int, int, int, int], itemsize: int) -> int:
        """Return what `KVStore.nbytes` is after tokens were appended to an empty store.

        shape      [batch, heads, tokens, head_dim] of all of them, in whatever pieces they came
        itemsize   bytes of one of their numbers: 4 or 2
        """
        ...


class KVAttention(Protocol):
    """What a KV-cache quantizer may have besides: attention on the codes, without `read`."""

    def attend(self, query: torch.Tensor, keys: KVStore, values: KVStore) -> torch.Tensor:
        """Return softmax(q K^T / sqrt(head_dim)) V for one query token, float32.

        query   [batch, query heads, head_dim] float32. Query head h reads head h // (query heads /
                heads); query heads are a multiple of heads. Stores hold at least one token.
        """
        ...


# Formats that others read ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerOutline:
    """A quantized layer without its numbers: what a format has to express.

    info         name, shape and kind of the layer
    scheme       how its weight, and perhaps its input, is quantized
    grid         the codes of the weight
    input_grid   the codes of its input; None where that is not quantized
    extras       what it has besides codes, scales and zero points (`EXTRAS`). Before a run begins:
                 what the method is bound to give it
    """

    info: LayerInfo
    scheme: Scheme
    grid: Grid
    input_grid: Grid | None = None
    extras: frozenset[str] = frozenset()


EXTRAS: Mapping[str, str] = {
    "scale": "its input is divided by a scale of each column",
    "rotation": "its input is rotated",
    "kept columns": "some columns are kept in 16 bits",
    "threshold": "columns of the input that reach a threshold are not rounded",
    "group index": "its groups are not columns that follow one another",
}
"""What a quantized layer may have besides codes, scales and zero points."""


class Layout(Protocol):
    """How a quantized folder stores its layers, so that other software reads them: both ways.

    name      what `--format` and `qframe convert --to` select
    readers   the software that reads it, for messages: "transformers, vLLM"
    parts     everything that a layer may be stored as, after its name: ("weight_packed", ...)

    A layout may have more attributes:

    names_left   keys of its section that depend on which layers are not quantized, as a frozenset;
                 none
    side_files   a method with the arguments of `config` that returns what readers look for beside
                 config.json, file name -> JSON object; none
    """

    name: str
    readers: str
    parts: tuple[str, ...]

    def objections(self, layers: Sequence[LayerOutline]) -> list[str]:
        """Return everything that the layout cannot express, and what to do instead.

        An empty list is a promise: `pack`, `unpack` and `config` work for these layers, and
        `unpack` gives back what was packed. A message names the layer.
        """
        ...

    def shapes(self, layer: LayerOutline) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return dtype, as safetensors names it, and shape of all that `pack` returns."""
        ...

    def pack(self, layer: StoredLayer) -> dict[str, torch.Tensor]:
        """Return the tensors of a layer by their names after the layer's."""
        ...

    def unpack(self, tensors: Mapping[str, torch.Tensor], layer: LayerOutline) -> StoredLayer:
        """Return the layer that `pack` packed. Raises WeightsError when tensors are not that."""
        ...

    def config(self, layers: Sequence[LayerOutline], left: Sequence[LayerInfo]) -> dict[str, Any]:
        """Return `quantization_config`, the section of config.json that readers look at.

        left   linear layers of the network that are not quantized
        """
        ...

    def layers(self, source: ModelFolder) -> list[tuple[LayerInfo, Scheme]] | None:
        """Return the quantized layers of a folder that anybody wrote, from config and headers.

        None when it is not of this layout. Raises WeightsError, naming layer and key, when it is,
        and says what this layout does not know.
        """
        ...


class Exporter(Protocol):
    """Writes a quantized network as another kind of file than a folder.

    name      what `--format` and `qframe convert --to` select
    readers   the software that reads it, for messages: "llama.cpp"
    suffix    of the file's name: ".gguf"
    """

    name: str
    readers: str
    suffix: str

    def objections(self, layers: Sequence[LayerOutline], config: Mapping[str, Any]) -> list[str]:
        """Return everything that the format cannot express, and what to do instead.

        config   that of the network: its architecture has to be one that the format knows
        """
        ...

    def write(self, model: StoredModel, file: Path) -> None:
        """Write a network for which there are no objections. `file` does not exist yet."""
        ...


# What others made -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedLayer:
    """What a checkpoint of another tool says of a layer, from its headers.

    kind      how its codes are stored, in the tool's words: "Q4_K", "nf4, blocks of 64"
    num_bits  of a code
    bytes     of all that is stored of it
    scheme    of qframe's, the nearest one: what rounding to nearest and the least error are
              asked of; None where there is none
    """

    name: str
    rows: int
    columns: int
    kind: str
    num_bits: int
    bytes: int
    scheme: Scheme | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CodedWeight:
    """The codes of a layer that somebody else stored: w = scale * v + offset.

    v is the code itself, or grid.values[code - grid.qmin]. Groups are of `columns / groups` columns
    each, in their order. A layer whose blocks run over the ends of its rows has other rows here:
    as many columns as a block, and weights in the same order.

    codes    [rows, columns] int16, in the grid
    grid     the codes, and what they stand for
    scale    [rows, groups] float64, finite, of any sign; 0 where all weights are the offset
    offset   [rows, groups] float64, finite
    weight   [rows, columns] float32, as the tool decodes them
    scale_moved, offset_moved   like scale, >= 0: how far they may have moved when they were stored,
             after codes had been chosen; 0 where codes were chosen for what is stored
    """

    codes: torch.Tensor
    grid: Grid
    scale: torch.Tensor
    offset: torch.Tensor
    weight: torch.Tensor
    scale_moved: torch.Tensor
    offset_moved: torch.Tensor


class Checkpoint(Protocol):
    """A checkpoint of another tool, opened: its layers one at a time.

    layers    name, as transformers has it -> what the headers say of a quantized layer
    carried   name -> dtype, of all other tensors
    """

    layers: Mapping[str, CodedLayer]
    carried: Mapping[str, str]

    def missing(self) -> list[tuple[str, str]]:
        """Return (layer, what of it is missing, or is not known) for what should be there."""
        ...

    def read(self, name: str) -> CodedWeight:
        """Return the codes of a layer. Raises WeightsError where they cannot be what they say."""
        ...


class Reader(Protocol):
    """Opens what other tools write and no layout holds, for `qframe verify` and `qframe inspect`.

    name      of the format: "gguf"
    writers   the software that writes it, for messages: "llama.cpp"
    """

    name: str
    writers: str

    def open(self, path: Path) -> Checkpoint | None:
        """Return a file or a folder, opened, from its headers alone; None for another format.

        Raises WeightsError for one of this format that cannot be read.
        """
        ...
