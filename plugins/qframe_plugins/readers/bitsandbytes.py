"""Folders that transformers saves of networks which bitsandbytes quantized: int8, nf4 and fp4.

Source: the format of bitsandbytes 0.50, as its Linear8bitLt and QuantState have it, and the folders
of transformers 5.23. A layer NAME is stored as, with 8 bits,

weight          [rows, columns] int8, codes -127..127; SCB [rows] float32, the largest weight of
                each row; weight_format, 0: rows one after the other. A weight is code * SCB / 127

and with 4 bits, all of a name that begins with "weight.",

weight          two codes of the flattened weight in a byte, the first in the high bits
absmax          the largest weight of each block of it, float32; or where that is quantized too,
                uint8, with nested_absmax [blocks / 256] float32 and nested_quant_map [256] float32:
                absmax is nested_quant_map[code] * nested_absmax + nested_offset
quant_map       [16] float32, what codes stand for. bitsandbytes computes with its own table
quant_state...  JSON as bytes: quant_type, blocksize, dtype, shape, nested_blocksize, nested_offset

Linear8bitLt rounds weights to float16 before it quantizes them, and the 4-bit layers are quantized
in the dtype that the network had.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from qframe import CodedLayer, CodedWeight, Grid, Scheme, hookimpl
from qframe.errors import UnsupportedError, WeightsError
from qframe_plugins.formats.codebook import NF4

if TYPE_CHECKING:
    import torch

    from qframe.weights import ModelFolder

NAME = "bitsandbytes"
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
MOST = 127  # the largest code of 8 bits
DTYPES = ("float32", "float16", "bfloat16")
FAR = 1e38  # nearly the largest float32
LONGEST = 1 << 12  # bytes of a quant_state
_TWELFTHS = (0, 1 / 16, 8, 12, 4, 6, 2, 3)  # of fp4, the numbers from 0 up in the order of codes
STATE = "weight.quant_state.bitsandbytes__"
PARTS_8 = ("weight", "SCB", "weight_format")
PARTS_4 = ("weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map")


class BitsAndBytesReader:
    """Opens folders of bitsandbytes."""

    name: str = NAME
    writers: str = "transformers with bitsandbytes"

    def open(self, path: Path) -> BitsAndBytesFolder | None:
        """Return a folder, opened; None for a file, and where config.json names another method."""
        from qframe.weights import ModelFolder

        if not (path / "config.json").is_file():
            return None
        source = ModelFolder(path)
        section = source.config.get("quantization_config")
        if not isinstance(section, Mapping) or section.get("quant_method") != NAME:
            return None
        return BitsAndBytesFolder(source, section)


class BitsAndBytesFolder:
    """A folder of bitsandbytes, opened."""

    def __init__(self, source: ModelFolder, section: Mapping[str, Any]) -> None:
        self._source, self._section = source, section
        self.carried: Mapping[str, str]
        self.layers: Mapping[str, CodedLayer]
        found: dict[str, None] = {}
        for name, tensor in source.tensors.items():
            own, _, last = name.rpartition(".")
            if last == "SCB" or (last == "weight" and tensor.dtype in ("I8", "U8")):
                found[own] = None
            elif f".{STATE}" in name:
                found[name.partition(f".{STATE}")[0]] = None
        self.layers = {name: self._layer(name) for name in found}
        owned = {f"{name}.{part}" for name in found for part in self._parts(name)}
        self.carried = {n: t.dtype for n, t in source.tensors.items() if n not in owned}

    def missing(self) -> list[tuple[str, str]]:
        """Return linear layers of the network that are not there, and what config.json denies."""
        from qframe.model import build, find_layers
        from qframe.weights import ModelFolder

        said = []
        for key, bits in (("load_in_8bit", 8), ("load_in_4bit", 4)):
            others = [n for n, layer in self.layers.items() if layer.num_bits != bits]
            if self._section.get(key) is True and others:
                said.append((others[0], f"config.json says {key}, but it is not stored so"))
        plain = ModelFolder(self._source.path)
        plain.config.pop("quantization_config", None)
        tied = plain.config.get("tie_word_embeddings", False)
        for name in find_layers(build(plain)):
            output = name == "lm_head" and tied
            if name not in self.layers and f"{name}.weight" not in self.carried and not output:
                said.append((name, "is neither quantized nor stored"))
        return said

    def read(self, name: str) -> CodedWeight:
        """Return the codes of a layer. Raises WeightsError for what bitsandbytes cannot write."""
        layer = self.layers[name]
        return self._int8(layer) if layer.num_bits == 8 else self._four_bits(layer)

    # Headers ------------------------------------------------------------------------------------

    @cached_property
    def _states_by_layer(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in self._source.tensors:
            if f".{STATE}" in name:
                found.setdefault(name.partition(f".{STATE}")[0], []).append(name)
        return found

    def _parts(self, name: str) -> list[str]:
        """Return everything that a layer may be stored as, after its name."""
        states = [n.removeprefix(f"{name}.") for n in self._states_by_layer.get(name, [])]
        return [*PARTS_8, *PARTS_4, *states]

    def _layer(self, name: str) -> CodedLayer:
        """Return what headers, and the quant_state, say of a layer."""
        tensors = self._source.tensors
        stored = sum(
            tensors[f"{name}.{part}"].bytes
            for part in self._parts(name)
            if f"{name}.{part}" in tensors
        )
        weight = tensors.get(f"{name}.weight")
        if weight is None:
            raise WeightsError(f"layer {name!r}: weight missing")
        if self._states_by_layer.get(name):
            state = self._state(name)
            kind, block = state["quant_type"], state["blocksize"]
            nested = ", absmax of 8 bits" if f"{name}.weight.nested_absmax" in tensors else ""
            rows, columns = state["shape"]
            fits = kind == "nf4" and columns % block == 0
            fields = {"format": "nf4", "group_size": block, "scale_dtype": "float32"}
            return CodedLayer(
                name=name,
                rows=rows,
                columns=columns,
                kind=f"{kind}, blocks of {block}{nested}",
                num_bits=4,
                bytes=stored,
                scheme=Scheme.parse(fields, NAME) if fits else None,
            )
        if weight.dtype != "I8" or len(weight.shape) != 2:
            what = "its quant_state is missing" if weight.dtype == "U8" else "int8 has two axes"
            raise WeightsError(
                f"layer {name!r}: weight is {weight.dtype} {list(weight.shape)}: {what}"
            )
        fields = {"num_bits": 8, "scale_rule": "restricted", "scale_dtype": "float32"}
        return CodedLayer(
            name=name,
            rows=weight.shape[0],
            columns=weight.shape[1],
            kind="int8, rows",
            num_bits=8,
            bytes=stored,
            scheme=Scheme.parse(fields, NAME),
        )

    def _state(self, name: str) -> dict[str, Any]:
        """Return the quant_state of a layer of 4 bits."""
        [key, *more] = self._states_by_layer[name]
        kind = key.rpartition("__")[2]
        if more:
            raise WeightsError(f"layer {name!r}: has {1 + len(more)} quant_states, one is possible")
        stored = self._source.tensors[key]
        if stored.dtype != "U8" or stored.bytes > LONGEST:
            raise WeightsError(
                f"layer {name!r}: quant_state is {stored.dtype} {list(stored.shape)}, should be up "
                f"to {LONGEST} bytes of JSON"
            )
        try:
            state = json.loads(bytes(self._source.raw(key).flatten().tolist()))
        except (ValueError, RecursionError) as error:
            raise WeightsError(f"layer {name!r}: quant_state is not JSON: {error}") from None
        if not isinstance(state, dict):
            raise WeightsError(f"layer {name!r}: quant_state is no JSON object")
        known = {"quant_type": ("nf4", "fp4"), "blocksize": BLOCKS, "dtype": DTYPES}
        for entry, allowed in known.items():
            value = state.get(entry)
            if isinstance(value, (bool, list, dict)) or value not in allowed:
                raise WeightsError(
                    f"layer {name!r}: {entry} of its quant_state is {value!r}; known: "
                    f"{', '.join(map(str, allowed))}"
                )
        if state["quant_type"] != kind:
            raise WeightsError(
                f"layer {name!r}: its quant_state is named {kind!r}, and says it is "
                f"{state['quant_type']!r}"
            )
        shape = state.get("shape")
        if not isinstance(shape, list) or len(shape) != 2 or not all(map(_is_size, shape)):
            raise WeightsError(f"layer {name!r}: shape of its quant_state is {shape!r}, not two")
        return state

    # Numbers ------------------------------------------------------------------------------------

    def _part(
        self, name: str, part: str, dtype: torch.dtype | None = None, count: int | None = None
    ) -> torch.Tensor:
        """Return a tensor of a layer, flat. Raises WeightsError where it is not as it should be."""
        if f"{name}.{part}" not in self._source.tensors:
            raise WeightsError(f"layer {name!r}: {part} missing")
        found = self._source.raw(f"{name}.{part}")
        if dtype not in (None, found.dtype) or count not in (None, found.numel()):
            wanted = " ".join(str(each) for each in (count, dtype) if each is not None)
            raise WeightsError(
                f"layer {name!r}: {part} should be {wanted}, got {found.dtype} {list(found.shape)}"
            )
        return found.flatten()

    def _int8(self, layer: CodedLayer) -> CodedWeight:
        """Return the codes of a layer of 8 bits."""
        import torch

        from qframe import bounds

        name, rows, columns = layer.name, layer.rows, layer.columns
        codes = self._part(name, "weight", torch.int8, rows * columns).reshape(rows, columns)
        if codes.numel() and int(codes.min()) < -MOST:
            raise WeightsError(f"layer {name!r}: holds code {int(codes.min())}, the least is -127")
        if f"{name}.weight_format" in self._source.tensors:
            order = self._part(name, "weight_format", None, 1)
            if float(order) != 0:
                raise UnsupportedError(
                    f"layer {name!r}: weight_format {float(order):g}, for one kind of GPU; 0 is "
                    f"known: save the folder with a newer bitsandbytes"
                )
        largest = _positive(self._part(name, "SCB", torch.float32, rows), name, "SCB")[:, None]
        scale = largest.double() / MOST
        return CodedWeight(
            codes=codes.to(torch.int16),
            grid=Grid(-MOST, MOST),
            scale=scale,
            offset=torch.zeros_like(scale),
            weight=codes.float() * largest * (1 / MOST),
            scale_moved=torch.from_numpy(bounds.stored_apart(scale.numpy(), "float16")),
            offset_moved=torch.zeros_like(scale),
        )

    def _four_bits(self, layer: CodedLayer) -> CodedWeight:
        """Return the codes of a layer of 4 bits."""
        import torch

        from qframe import bounds

        name, state = layer.name, self._state(layer.name)
        count, block = layer.rows * layer.columns, int(state["blocksize"])
        if count % block:
            raise UnsupportedError(f"layer {name!r}: {count} weights, no whole blocks of {block}")
        raw = self._part(name, "weight").contiguous().view(torch.uint8)
        if len(raw) != -(-count // 2):
            raise WeightsError(
                f"layer {name!r}: weight has {len(raw)} bytes, {count} codes take {-(-count // 2)}"
            )
        codes = torch.stack([raw >> 4, raw & 15], dim=1).flatten()[:count].long()
        table = torch.tensor(_values(state["quant_type"]), dtype=torch.float32)
        stored = self._part(name, "weight.quant_map", torch.float32, len(table))
        if not torch.equal(stored, table):
            raise WeightsError(
                f"layer {name!r}: quant_map is not that of {state['quant_type']}, with which "
                f"bitsandbytes computes whatever is stored"
            )
        absmax, moved = self._absmax(layer, state, count // block)
        whole = layer.columns % block == 0
        shape = (layer.rows, layer.columns) if whole else (count // block, block)
        absmax, moved = (each.reshape(shape[0], -1) for each in (absmax, moved))
        by_group = table[codes].reshape(*absmax.shape, block)
        weight = by_group * absmax[..., None]
        dtype = getattr(torch, state["dtype"])
        grid = Grid.of(sorted(set(table.tolist())))
        ranks = torch.searchsorted(table.unique(), table) + grid.qmin
        scale = absmax.double()
        if state["dtype"] != "float32":  # weights had that dtype when they were quantized
            rounded = bounds.stored_apart((scale + moved).numpy(), state["dtype"])
            moved = moved + torch.from_numpy(rounded)
        return CodedWeight(
            codes=ranks.to(torch.int16)[codes].reshape(shape),
            grid=grid,
            scale=scale,
            offset=torch.zeros_like(scale),
            weight=weight.to(dtype).float().reshape(shape),
            scale_moved=moved,
            offset_moved=torch.zeros_like(scale),
        )

    def _absmax(
        self, layer: CodedLayer, state: Mapping[str, Any], blocks: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the largest weight of each block, and how far it may have moved, [blocks]."""
        import torch

        name = layer.name
        if f"{name}.weight.nested_absmax" not in self._source.tensors:
            plain = self._part(name, "weight.absmax", torch.float32, blocks)
            return _positive(plain, name, "absmax"), torch.zeros(blocks, dtype=torch.float64)
        width, offset = state.get("nested_blocksize"), state.get("nested_offset")
        if not _is_size(width) or not _is_number(offset):
            raise WeightsError(
                f"layer {name!r}: nested_blocksize and nested_offset of its quant_state are "
                f"{width!r} and {offset!r}"
            )
        codes = self._part(name, "weight.absmax", torch.uint8, blocks).long()
        table = self._part(name, "weight.nested_quant_map", torch.float32, 256)
        largest = self._part(name, "weight.nested_absmax", torch.float32, -(-blocks // width))
        largest = _positive(largest, name, "nested_absmax")
        if not bool((torch.isfinite(table[1:]) & (table[1:] > table[:-1])).all()):
            raise WeightsError(f"layer {name!r}: nested_quant_map does not ascend")
        of_block = torch.arange(blocks) // width
        absmax = table[codes] * largest[of_block] + torch.tensor(float(offset))
        gaps = torch.diff(table.double())
        around = torch.maximum(gaps[(codes - 1).clamp(min=0)], gaps[codes.clamp(max=254)])
        return _positive(absmax, name, "absmax"), around * largest[of_block].double()


def _values(kind: str) -> tuple[float, ...]:
    """Return what the 16 codes of a kind stand for."""
    if kind == "nf4":
        return NF4
    return tuple(sign * each / 12 for sign in (1, -1) for each in _TWELFTHS)


def _is_size(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31


def _is_number(value: object) -> TypeGuard[float]:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return -FAR < value < FAR


def _positive(found: torch.Tensor, name: str, what: str) -> torch.Tensor:
    """Return numbers. Raises WeightsError for one that is negative or not finite."""
    import torch

    bad = ~(torch.isfinite(found) & (found >= 0))
    if bool(bad.any()):
        raise WeightsError(
            f"layer {name!r}: {what} is {float(found[bad][0]):g} at {int(bad.nonzero()[0])} "
            f"({int(bad.sum())} are negative or not finite)"
        )
    return found


@hookimpl
def qframe_readers() -> Iterable[BitsAndBytesReader]:
    """Register the reader."""
    return [BitsAndBytesReader()]
