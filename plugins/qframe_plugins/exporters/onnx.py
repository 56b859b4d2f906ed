"""ONNX, for onnxruntime: a decoder whose quantized layers are nodes of MatMulNBits.

Source: the operators of ONNX, opset 17, and com.microsoft's MatMulNBits as onnxruntime 1.32
documents it. That multiplies with the codes of b = 2, 4 or 8 bits of a layer,

B             [rows, blocks, width b / 8] uint8: the codes of a block of `width` columns one after
              the other, lowest bits first; the last block may reach beyond the columns
scales        [rows, blocks] float32
zero_points   [rows, blocks b / 8] uint8, packed in the same way; 2^(b-1) without them

and `width` is a power of two from 16 on. Codes of other bits are stored in the next larger of
these, scales of groups of another width repeated in each of their blocks, so nothing is rounded.
Every other tensor keeps its dtype and is converted to float32, in which the network computes.

The graph is that of Llama and its relatives: input_ids [batch, tokens] int64 to logits [batch,
tokens, vocabulary] float32, causal, without a cache and without padding. The frequencies of rotary
embeddings are those of transformers, numbers in the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qframe import LayerOutline, Scheme, hookimpl
from qframe.errors import MissingExtraError, UnsupportedError, WeightsError
from qframe.layouts import objections_of, said_of_extras
from qframe_plugins.layouts.zero_points import codes_and_zeros

if TYPE_CHECKING:
    import numpy as np
    import torch

    from qframe.stored import StoredLayer
    from qframe.stored_model import StoredModel

MODELS = ("llama", "mistral", "qwen2", "qwen3")
ROPE = ("default", "linear", "llama3", "yarn")  # whose frequencies depend on no input
SMALLEST, LARGEST = 16, 128  # widths of blocks: what there is, and what kernels are made for
STORED_BITS = (2, 4, 8)
OPSET, IR_VERSION = 17, 8
MICROSOFT = "com.microsoft"
MOST_BYTES = (1 << 31) - (1 << 24)  # of a protobuf message, less what is not tensors
EXTRA = "onnx"


class ONNX:
    """Files that onnxruntime runs."""

    name = "onnx"
    readers = "onnxruntime"
    suffix = ".onnx"

    def objections(self, layers: Sequence[LayerOutline], config: Mapping[str, Any]) -> list[str]:
        """Return what MatMulNBits cannot hold, and what is not known of the network."""
        return [*_objections_to_network(config), *objections_of(layers, _objections)]

    def write(self, model: StoredModel, file: Path) -> None:
        """Write the network as one file.

        Raises MissingExtraError without the package onnx; UnsupportedError for a network that is
        too large for one file, or holds tensors that the graph has no place for.
        """
        try:
            import onnx
        except ImportError:
            raise MissingExtraError("onnx", EXTRA, "writing ONNX files") from None
        _check_size(model)
        network: Any = model.network()
        graph = _Graph(model)
        logits = _decoder(graph, network)
        unused = sorted(set(model.carried()) - graph.used - {"model.rotary_emb.inv_freq"})
        if unused and not (unused == ["lm_head.weight"] and graph.tied):
            raise UnsupportedError(f"tensor {unused[0]!r} has no place in the graph of a Llama")
        file.write_bytes(graph.finished(onnx, logits))


# What a layer becomes -----------------------------------------------------------------------------


def stored_bits(scheme: Scheme) -> int:
    """Return the bits that a code is stored in."""
    return min(bits for bits in STORED_BITS if bits >= scheme.num_bits)


def width_of(scheme: Scheme, columns: int) -> int:
    """Return how many columns a block has; less than SMALLEST where groups have no blocks."""
    if scheme.group_size is None:
        width = SMALLEST
        while width < min(columns, LARGEST):
            width *= 2
        return width
    return min(scheme.group_size & -scheme.group_size, LARGEST)


def blocks(layer: StoredLayer) -> dict[str, torch.Tensor]:
    """Return B, scales and, where there are such, zero_points, by the names of the operator."""
    import torch

    from qframe import scales
    from qframe.packing import pack_codes

    packed = layer.packed
    scheme, rows, columns = packed.scheme, packed.rows, packed.columns
    bits, width = stored_bits(scheme), width_of(scheme, columns)
    count = -(-columns // width)
    group_of_block = torch.arange(count) * width // scheme.group_width(columns)
    codes, zeros = codes_and_zeros(layer)
    if scheme.symmetric:
        codes = codes + ((1 << bits - 1) - (1 << scheme.num_bits - 1))
    padded = torch.zeros(rows, count * width, dtype=torch.uint8)
    padded[:, :columns] = codes
    stored = pack_codes(padded, bits).view(torch.uint8)
    scale = scales.read(packed.scale, scheme.scale_dtype).expand(rows, -1)
    found = {
        "B": stored.reshape(rows, count, width * bits // 8),
        "scales": scale[:, group_of_block].contiguous(),
    }
    if not scheme.symmetric:
        words = pack_codes(zeros.expand(rows, -1)[:, group_of_block].contiguous(), bits)
        found["zero_points"] = words.view(torch.uint8)[:, : -(-count * bits // 8)].contiguous()
    return found


def attributes(layer: LayerOutline) -> dict[str, Any]:
    """Return what the node of a layer is told; accuracy_level 1 forbids to round activations."""
    info, scheme = layer.info, layer.scheme
    return {
        "domain": MICROSOFT,
        "K": info.columns,
        "N": info.rows,
        "bits": stored_bits(scheme),
        "block_size": width_of(scheme, info.columns),
        "accuracy_level": 1,
    }


def _objections(layer: LayerOutline) -> list[str]:
    """Return why a layer is no node of MatMulNBits."""
    scheme = layer.scheme
    said = said_of_extras(layer)
    if layer.info.kind != "Linear":
        said.append(f"weights of {layer.info.kind} are not known; ignore these layers")
    if scheme.type != "int" or scheme.format is not None:
        said.append(f"scheme {scheme.describe()!r}: MatMulNBits multiplies with integers")
    if width_of(scheme, layer.info.columns) < SMALLEST:
        said.append(
            f"group_size={scheme.group_size} is no multiple of {SMALLEST}; use one that is, or -1"
        )
    if scheme.input_activations is not None:
        said.append(
            f"activations are {scheme.input_activations.describe()}; use a scheme of weights alone"
        )
    return said


def _objections_to_network(config: Mapping[str, Any]) -> list[str]:
    """Return what is not known of a network."""
    kind = config.get("model_type")
    if kind not in MODELS:
        return [f"model_type {kind!r} is not known; known: {', '.join(MODELS)}"]
    said = []
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling not in ROPE:
        said.append(f"rotary embeddings of type {scaling!r} are not known; {', '.join(ROPE)} are")
    part = rope.get("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0)
    if part != 1.0:
        said.append(f"partial_rotary_factor={part} is not known; 1.0 is")
    if config.get("hidden_act", "silu") != "silu":
        said.append(f"hidden_act {config['hidden_act']!r} is not known; silu is")
    if config.get("sliding_window") and (kind == "mistral" or config.get("use_sliding_window")):
        said.append(f"sliding_window={config['sliding_window']} is not known; null is")
    return said


def _check_size(model: StoredModel) -> None:
    """Raise UnsupportedError for a network that is too large for one file."""
    size = sum(model.source.tensors[name].bytes for name in model.carried())
    for outline in model.outlines.values():
        info, scheme = outline.info, outline.scheme
        count = -(-info.columns // width_of(scheme, info.columns))
        bits = count * (width_of(scheme, info.columns) + 1) * stored_bits(scheme) + 32 * count
        size += info.rows * bits // 8
    if size > MOST_BYTES:
        raise UnsupportedError(
            f"the file would have {size} bytes, and ONNX files of one part have at most 2 GiB; "
            f"use another format"
        )


# The graph ----------------------------------------------------------------------------------------


class _Graph:
    """A graph in the making. Methods return the name of a value.

    model   where tensors come from
    used    tensors of the folder that the graph has
    tied    whether the output layer is the embedding
    """

    def __init__(self, model: StoredModel) -> None:
        self.model = model
        self.used: set[str] = set()
        self.tied = False
        self._nodes: list[Any] = []
        self._initializers: dict[str, Any] = {}

    def add(self, op: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Add a node with one output."""
        from onnx import helper

        name = f"{op}_{len(self._nodes)}"
        self._nodes.append(
            helper.make_node(op, [*inputs], [name], name=name, domain=domain, **attributes)
        )
        return name

    def store(self, name: str, tensor: torch.Tensor) -> str:
        """Add a tensor to the file."""
        from onnx import TensorProto, helper

        if name not in self._initializers:
            kind = {
                "float32": TensorProto.FLOAT,
                "float16": TensorProto.FLOAT16,
                "bfloat16": TensorProto.BFLOAT16,
                "uint8": TensorProto.UINT8,
                "int64": TensorProto.INT64,
            }[str(tensor.dtype).removeprefix("torch.")]
            content = _little_endian(tensor)
            self._initializers[name] = helper.make_tensor(
                name, kind, [*tensor.shape], content, raw=True
            )
        return name

    def numbers(self, *values: int) -> str:
        """Add a constant [n] int64: a shape, or axes."""
        import torch

        name = f"numbers {' '.join(str(value) for value in values)}"
        return self.store(name, torch.tensor(values, dtype=torch.int64))

    def number(self, value: float) -> str:
        """Add a constant [] float32."""
        import torch

        return self.store(f"number {value!r}", torch.tensor(value, dtype=torch.float32))

    def carried(self, name: str) -> str:
        """Add a tensor of the folder as it is. Raises WeightsError where it is missing."""
        if name not in self.model.source.tensors:
            raise WeightsError(f"{self.model.source.path}: tensor {name!r} is missing")
        self.used.add(name)
        return self.store(name, self.model.source.read(name))

    def as_float(self, value: str, source: str) -> str:
        """Convert a value to float32; `source` is the tensor of the folder whose dtype it has."""
        if self.model.source.tensors[source].dtype == "F32":
            return value
        return self.add("Cast", value, to=1)

    def vector(self, name: str) -> str:
        """Add a norm's weight, or a bias, as float32."""
        return self.as_float(self.carried(name), name)

    def linear(self, x: str, name: str) -> str:
        """Add a linear layer, quantized or not."""
        outline = self.model.outlines.get(name)
        if outline is None:
            y = self.add("MatMul", x, self.transposed(f"{name}.weight"))
        else:
            parts = blocks(self.model.layer(name))
            stored = [self.store(f"{name}.{part}", tensor) for part, tensor in parts.items()]
            y = self.add("MatMulNBits", x, *stored, **attributes(outline))
        bias = f"{name}.bias"
        if bias in self.model.source.tensors:
            y = self.add("Add", y, self.vector(bias))
        return y

    def transposed(self, name: str) -> str:
        """Add the weight of a layer that is not quantized, [columns, rows] float32."""
        weight = self.as_float(self.carried(name), name)
        return self.add("Transpose", weight, perm=[1, 0])

    def norm(self, x: str, name: str, epsilon: float) -> str:
        """Add a root mean square norm over the last axis."""
        mean = self.add("ReduceMean", self.add("Mul", x, x), axes=[-1], keepdims=1)
        root = self.add("Sqrt", self.add("Add", mean, self.number(epsilon)))
        return self.add("Mul", self.add("Div", x, root), self.vector(f"{name}.weight"))

    def finished(self, onnx: Any, logits: str) -> bytes:
        """Return the file."""
        import qframe

        self._nodes.append(onnx.helper.make_node("Identity", [logits], ["logits"], name="logits"))
        kinds = onnx.TensorProto
        axes = ["batch", "tokens"]
        ids = onnx.helper.make_tensor_value_info("input_ids", kinds.INT64, axes)
        vocabulary = int(self.model.config["vocab_size"])
        out = onnx.helper.make_tensor_value_info("logits", kinds.FLOAT, [*axes, vocabulary])
        graph = onnx.helper.make_graph(
            self._nodes, "decoder", [ids], [out], list(self._initializers.values())
        )
        made = onnx.helper.make_model(
            graph,
            ir_version=IR_VERSION,
            producer_name="qframe",
            producer_version=qframe.__version__,
            opset_imports=[
                onnx.helper.make_opsetid("", OPSET),
                onnx.helper.make_opsetid(MICROSOFT, 1),
            ],
        )
        content: bytes = made.SerializeToString(deterministic=True)
        return content


def _little_endian(tensor: torch.Tensor) -> bytes:
    """Return the bytes of a tensor, row by row."""
    import torch

    flat: np.ndarray[Any, Any] = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat.tobytes()


def _decoder(graph: _Graph, network: Any) -> str:
    """Add the whole network, from input_ids to logits.

    network   as transformers builds it: what its config leaves out is filled in, and frequencies
              are computed
    """
    config: Mapping[str, Any] = network.config.to_dict()
    epsilon = float(config["rms_norm_eps"])
    embedding = "model.embed_tokens.weight"
    x = graph.as_float(graph.add("Gather", graph.carried(embedding), "input_ids"), embedding)
    turn, mask = _rotation_and_mask(graph, network.model.rotary_emb)
    for number in range(int(config["num_hidden_layers"])):
        block = f"model.layers.{number}"
        z = graph.norm(x, f"{block}.input_layernorm", epsilon)
        x = graph.add("Add", x, _attention(graph, z, f"{block}.self_attn", config, turn, mask))
        z = graph.norm(x, f"{block}.post_attention_layernorm", epsilon)
        gate = graph.linear(z, f"{block}.mlp.gate_proj")
        silu = graph.add("Mul", gate, graph.add("Sigmoid", gate))
        up = graph.linear(z, f"{block}.mlp.up_proj")
        down = graph.linear(graph.add("Mul", silu, up), f"{block}.mlp.down_proj")
        x = graph.add("Add", x, down)
    x = graph.norm(x, "model.norm", epsilon)
    graph.tied = bool(config["tie_word_embeddings"]) and "lm_head" not in graph.model.outlines
    if graph.tied:
        return graph.add("MatMul", x, graph.transposed(embedding))
    return graph.linear(x, "lm_head")


def _rotation_and_mask(graph: _Graph, rotary: Any) -> tuple[tuple[str, str], str]:
    """Add cosines and sines [tokens, head_dim] of the angles, and what hides later tokens."""
    import torch

    frequencies = graph.store("inv_freq", rotary.inv_freq.float()[None])
    tokens = graph.add("Gather", graph.add("Shape", "input_ids"), graph.numbers(1), axis=0)
    zero = graph.store("zero", torch.tensor(0, dtype=torch.int64))
    one = graph.store("one", torch.tensor(1, dtype=torch.int64))
    last = graph.add("Squeeze", tokens, graph.numbers(0))
    positions = graph.add("Cast", graph.add("Range", zero, last, one), to=1)
    column = graph.add("Unsqueeze", positions, graph.numbers(1))
    row = graph.add("Unsqueeze", positions, graph.numbers(0))
    angles = graph.add("Mul", column, frequencies)
    both = graph.add("Concat", angles, angles, axis=-1)
    scaling = graph.number(float(rotary.attention_scaling))
    cosines = graph.add("Mul", graph.add("Cos", both), scaling)
    sines = graph.add("Mul", graph.add("Sin", both), scaling)
    hidden = graph.number(float(torch.finfo(torch.float32).min))
    mask = graph.add("Where", graph.add("Less", column, row), hidden, graph.number(0.0))
    return (cosines, sines), mask


def _attention(
    graph: _Graph, x: str, name: str, config: Mapping[str, Any], turn: tuple[str, str], mask: str
) -> str:
    """Add attention: heads are [batch, key heads, queries of each, tokens, head_dim]."""
    heads = int(config["num_attention_heads"])
    keys = int(config.get("num_key_value_heads") or heads)
    size = int(config.get("head_dim") or int(config["hidden_size"]) // heads)

    def split(part: str, each: int) -> str:
        y = graph.linear(x, f"{name}.{part}_proj")
        y = graph.add("Reshape", y, graph.numbers(0, 0, keys, each, size))
        y = graph.add("Transpose", y, perm=[0, 2, 3, 1, 4])
        if f"{name}.{part}_norm.weight" in graph.model.source.tensors:
            y = graph.norm(y, f"{name}.{part}_norm", float(config["rms_norm_eps"]))
        return y

    q = _turned(graph, split("q", heads // keys), size, turn)
    k = _turned(graph, split("k", 1), size, turn)
    v = split("v", 1)
    products = graph.add("MatMul", q, graph.add("Transpose", k, perm=[0, 1, 2, 4, 3]))
    scores = graph.add("Mul", products, graph.number(size**-0.5))
    weights = graph.add("Softmax", graph.add("Add", scores, mask), axis=-1)
    found = graph.add("Transpose", graph.add("MatMul", weights, v), perm=[0, 3, 1, 2, 4])
    joined = graph.add("Reshape", found, graph.numbers(0, 0, heads * size))
    return graph.linear(joined, f"{name}.o_proj")


def _turned(graph: _Graph, x: str, size: int, turn: tuple[str, str]) -> str:
    """Add the rotation of each head by its position: its two halves are pairs."""
    first = graph.add("Slice", x, *(graph.numbers(n) for n in (0, size // 2, -1)))
    second = graph.add("Slice", x, *(graph.numbers(n) for n in (size // 2, size, -1)))
    crossed = graph.add("Concat", graph.add("Neg", second), first, axis=-1)
    cosines, sines = turn
    return graph.add("Add", graph.add("Mul", x, cosines), graph.add("Mul", crossed, sines))


@hookimpl
def qframe_exporters() -> Iterable[ONNX]:
    """Register the exporter."""
    return [ONNX()]
