"""The network: its blocks and linear layers, found by structure; weights that come and go.

No list of architectures: a block is an element of an outermost ModuleList that holds linear
layers (a decoder layer, an encoder layer); a linear layer is an nn.Linear or transformers'
Conv1D. A network without such lists, an nn.Sequential say, is one block.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from weakref import WeakValueDictionary

import torch
from torch import nn

from qframe.contracts import LayerInfo
from qframe.errors import ModelError, NonFiniteError
from qframe.fingerprints import Origin, fingerprint
from qframe.freed import hand_back_small
from qframe.weights import DTYPE_NAMES, DTYPES, ModelFolder, check_finite

SIZES = re.compile(
    r"(size|width|dim|embd|inner|ctx|positions|embeddings|heads?|layers?|blocks|experts|depth)$"
)
"""How keys of config.json end that say how many modules there are, or how large."""
LARGEST_SIZE = 1 << 24  # of such a number: of tokens, of a layer's columns, of positions
MOST_LAYERS = 1 << 10  # unless there are more tensors than that


@dataclass
class Network:
    """A network and where its weights come from.

    module    the network; with a `folder`, its parameters are on the meta device until loaded
    folder    the source of weights; None for a module that lives in memory
    blocks    block name -> module, in the network's order
    layers    linear layers by name, in the network's order
    """

    module: nn.Module
    folder: ModelFolder | None = None
    blocks: Mapping[str, nn.Module] = field(init=False)
    layers: Mapping[str, LayerInfo] = field(init=False)

    def __post_init__(self) -> None:
        self.layers = find_layers(self.module)
        if not self.layers:
            raise ModelError(
                f"{type(self.module).__name__} has no linear layers (nn.Linear or Conv1D): "
                f"nothing to quantize"
            )
        if "" in self.layers:
            raise ModelError(
                f"the module is itself one {type(self.module).__name__}, a layer without a name: "
                f"put it into a network, nn.Sequential(layer), and quantize that"
            )
        self.blocks = find_blocks(self.module, self.layers)
        self._stored = stored_names(self.module, self.folder.tensors if self.folder else {})
        self._tied = {n for n, times in Counter(self._stored.values()).items() if times > 1}
        self._shared: WeakValueDictionary[str, nn.Parameter] = WeakValueDictionary()
        self._cast: dict[str, torch.dtype] = {}  # name in the files -> the dtype it is stored in
        self._paths = {child: name for name, child in self.module.named_modules()}
        self._lock = threading.Lock()

    @classmethod
    def from_folder(cls, folder: ModelFolder) -> Network:
        """Build the network of a folder without its weights.

        Raises ModelError when the installed transformers does not know the architecture, or
        when names in the files and in the network differ.
        """
        done = folder.config.get("quantization_config")
        if done:
            raise ModelError(
                f"{folder.path} is already quantized (quant_method "
                f"{done.get('quant_method')!r}); quantize the full-precision model instead"
            )
        module = build(folder)
        network = cls(module, folder)
        missing = sorted(set(network._stored.values()) - folder.tensors.keys())
        if missing:
            raise ModelError(
                f"{folder.path}: parameter {missing[0]!r} of {type(module).__name__} is in no "
                f"file ({len(missing)} missing); the checkpoint may be of another version: load "
                f"it with transformers and save it with save_pretrained"
            )
        return network

    def block_of(self, layer: str) -> str:
        """Return the name of the block that holds a layer; "" for one outside all blocks."""
        return next((b for b in self.blocks if b and layer.startswith(f"{b}.")), "")

    def load(self, module: nn.Module, *, recurse: bool) -> None:
        """Read the parameters of a module from the folder, as float32, where not yet loaded.

        recurse   also those of its children
        """
        if self.folder is None:
            return
        with self._lock:
            for child in module.modules() if recurse else (module,):
                for key, parameter in child._parameters.items():
                    if parameter is not None and parameter.is_meta:
                        child._parameters[key] = self._materialize(child, key, parameter)

    def release(self, module: nn.Module) -> None:
        """Free the parameters of a module and its children; `load` brings them back."""
        for child in module.modules():
            self._release(child)

    def _release(self, child: nn.Module) -> None:
        for key, parameter in child._parameters.items():
            if parameter is not None and self.folder is not None and not parameter.is_meta:
                child._parameters[key] = _meta(parameter)

    def release_others(self, keep: Container[str]) -> None:
        """Free the parameters of modules that are in no block; `load` brings them back.

        keep   names of layers whose weights are not those of the folder any more
        """
        inside = {child for block in self.blocks.values() for child in block.modules()}
        for child, name in self._paths.items():
            if child not in inside and name not in keep:
                self._release(child)

    def _materialize(self, child: nn.Module, key: str, expected: nn.Parameter) -> nn.Parameter:
        """Return the values of a parameter; tied ones stay one object while any has them."""
        name = self._stored[f"{self._paths[child]}.{key}".lstrip(".")]
        there = self._shared.get(name)
        if there is not None:
            return there
        values = self.read(name)
        if values.shape != expected.shape:
            raise ModelError(
                f"parameter {name!r}: the file has shape {list(values.shape)}, the network "
                f"expects {list(expected.shape)}"
            )
        loaded = nn.Parameter(values, requires_grad=False)
        if name in self._tied:
            self._shared[name] = loaded
        return loaded

    def cast(self, dtype: torch.dtype, quantized: Container[str]) -> None:
        """Let all parameters be stored in another dtype, but weights of layers that are quantized.

        From now on they have the values that this dtype has for them. A module in memory keeps its
        dtypes, and gets the values.

        dtype       of 16 bits
        quantized   names of layers. A weight that another module has as well is that module's

        Raises NonFiniteError for a number that does not fit the dtype, here or when it is read.
        """
        own = {f"{layer}.weight" for layer in self.layers if layer in quantized}
        left = {n for p, n in self._stored.items() if p not in own}
        self._cast = dict.fromkeys(left, dtype)
        if self.folder is None:
            for name, parameter in self.module.named_parameters():
                values = self.carried(self._stored[name], parameter.detach())
                parameter.data = values.to(parameter.dtype)

    def carried(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Return a tensor as it is stored where no codes stand for it.

        name   in the files
        """
        dtype = self._cast.get(name)
        if dtype is None or not values.is_floating_point():
            return values
        found = values.to(dtype)
        if not bool(torch.isfinite(found).all()):
            check_finite(values, f"tensor {name!r}")
            raise NonFiniteError(
                f"tensor {name!r}: its largest number, {float(values.abs().max()):.4g}, does not "
                f"fit carried_dtype {str(dtype).removeprefix('torch.')!r}; use 'bfloat16', or none"
            )
        return found

    def carried_dtype(self, name: str) -> torch.dtype | None:
        """Return the dtype that a tensor is cast to, by its name in the files; None for its own."""
        return self._cast.get(name)

    def read(self, name: str) -> torch.Tensor:
        """Return a parameter from the folder as float32."""
        if self.folder is None:
            raise ModelError("this network lives in memory and has no folder to read from")
        if name not in self._cast:
            return self.folder.read_float32(name)
        return self.carried(name, self.folder.read(name)).to(torch.float32)

    def weight(self, layer: str) -> torch.Tensor:
        """Return the weight of a layer, [rows, columns] float32, checked to be finite.

        One that is not loaded is read, and not kept.
        """
        module = self.module.get_submodule(layer)
        weight = get_weight(module)
        if weight.is_meta:
            with self._lock:
                read = self._materialize(module, "weight", get_parameter(module)).data
            weight = read.T if _is_conv1d(module) else read
        if self.folder is None:
            check_finite(weight, f"weight of layer {layer!r}")
        return weight.to(torch.float32).contiguous()

    def rows_of(self, layer: str) -> Callable[[slice], torch.Tensor] | None:
        """Return what returns some rows of the weight of a layer, as `weight` does all of them.

        None where rows do not lie in a row in the file, or do not become float32 at once.
        """
        module = self.module.get_submodule(layer)
        weight = get_weight(module)
        if not weight.is_meta:
            return partial(_rows, weight, layer)
        name = self._stored[f"{layer}.weight".lstrip(".")]
        if self.folder is None or _is_conv1d(module) or name in self._cast:
            return None
        fits = self.folder.tensors[name].shape == weight.shape
        return partial(self.folder.rows_float32, name) if fits else None

    def origin(self, layer: str) -> Callable[[], Origin]:
        """Return what tells how the weight of a layer is stored, whatever becomes of the module."""
        name = self._stored[f"{layer}.weight".lstrip(".")]
        if self.folder is not None:
            return partial(_of_folder, self.folder, name)
        return partial(_of_tensor, get_parameter(self.module.get_submodule(layer)).detach())

    def is_made_of(self, layer: str, origin: Origin) -> bool:
        """Return whether the weight of a layer is one that was stored, now or in another dtype."""
        if self.origin(layer)() == origin:
            return True
        dtype = DTYPES.get(origin.dtype)
        if dtype is None:
            return False
        weight = self.own(f"{layer}.weight".lstrip("."))
        there = weight.to(dtype)
        same = torch.equal(there.to(weight.dtype), weight)
        return same and fingerprint(there) == origin.fingerprint

    def stored_name(self, parameter: str) -> str:
        """Return the name under which a parameter lies in the files."""
        return self._stored[parameter]

    def is_tied(self, layer: str) -> bool:
        """Return whether another module uses the very same weight."""
        return self.is_shared(f"{layer}.weight")

    def is_shared(self, parameter: str) -> bool:
        """Return whether a parameter, given by its full name, has another name as well."""
        return self._stored[parameter] in self._tied

    def carry(self, name: str) -> tuple[torch.dtype, Iterator[torch.Tensor]]:
        """Return the dtype that a tensor of the folder is stored in, and its pieces one by one.

        name   in the files
        """
        if self.folder is None:
            raise ModelError("this network lives in memory and has no folder to read from")
        pieces = (self.carried(name, piece) for piece in self.folder.pieces(name))
        first = next(pieces)
        return first.dtype, chain((first,), pieces)

    def own(self, parameter: str) -> torch.Tensor:
        """Return a parameter in the dtype that it is stored in.

        That of the files, or of the module in memory, where it is not cast.
        """
        name = self._stored[parameter]
        if self.folder is not None:
            return self.carried(name, self.folder.read(name))
        return self.carried(name, self.module.get_parameter(parameter).detach())


def _of_folder(folder: ModelFolder, name: str) -> Origin:
    return Origin(folder.tensors[name].dtype, folder.fingerprint(name))


def _of_tensor(tensor: torch.Tensor) -> Origin:
    return Origin(DTYPE_NAMES[tensor.dtype], fingerprint(tensor))


def stored_names(module: nn.Module, stored: Container[str]) -> dict[str, str]:
    """Return parameter name -> the name it has in the files: tied ones are stored once."""
    aliases: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    return {
        name: next((n for n in names if n in stored), names[0])
        for names in aliases.values()
        for name in names
    }


def replace_module(network: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Put `new` in place of the submodule `name`; return the network (`new` when name is "")."""
    if not name:
        return new
    parent, _, key = name.rpartition(".")
    setattr(network.get_submodule(parent), key, new)
    return network


def build(folder: ModelFolder) -> nn.Module:
    """Return the network that config.json describes, with all parameters on the meta device."""
    import transformers

    names = folder.config.get("architectures") or []
    first = names[0] if isinstance(names, list) and names else None
    network = getattr(transformers, first, None) if isinstance(first, str) else None
    if not (isinstance(network, type) and issubclass(network, nn.Module)):
        wanted = first or folder.config.get("model_type")
        hint = (
            "; it brings its own code, which qframe does not run"
            if "auto_map" in folder.config
            else ""
        )
        raise ModelError(
            f"{folder.path / 'config.json'}: transformers {transformers.__version__} has no "
            f"architecture {wanted!r}{hint}; build the module yourself and give it to "
            f"qframe.quantize"
        )
    _check_sizes(folder)
    try:
        config = transformers.AutoConfig.from_pretrained(folder.path, local_files_only=True)
        config.dtype = torch.float32
        with parameters_on_meta(), hand_back_small():
            module: nn.Module = network(config)
        tie = getattr(module, "tie_weights", None)
        if tie is not None:
            tie()
    except Exception as error:  # whatever its configuration makes of such values
        said = " ".join(str(error).split())
        raise ModelError(
            f"{folder.path / 'config.json'}: transformers {transformers.__version__} builds no "
            f"{first} of it: {type(error).__name__}: {said}"
        ) from error
    return module.eval().requires_grad_(False)


def _check_sizes(folder: ModelFolder) -> None:
    """Raise ModelError for sizes in config.json that no network with these files can have.

    They say how many modules are made, and how large their constants are, before any file is read.
    Other numbers may be as large as they like: rope_theta is.
    """
    where = folder.path / "config.json"
    most = max(len(folder.tensors) if folder.has_weights else 0, MOST_LAYERS)
    for key, value in folder.config.items():
        if isinstance(value, int) and SIZES.search(key):
            limit = most if key.endswith(("layer", "layers", "blocks", "depth")) else LARGEST_SIZE
            if abs(value) > limit:
                raise ModelError(f"{where}: {key} is {value}, more than {limit}")


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Build modules without memory for parameters; buffers are real, as they hold constants."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        if param is not None:
            self._parameters[name] = _meta(param)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def find_layers(module: nn.Module) -> dict[str, LayerInfo]:
    """Return the linear layers of a network by name, in its order."""
    found = {}
    for name, child in module.named_modules():
        if is_linear(child):
            weight = get_weight(child)
            found[name] = LayerInfo(
                name=name, rows=weight.shape[0], columns=weight.shape[1], kind=type(child).__name__
            )
    return found


def find_blocks(module: nn.Module, layers: Mapping[str, LayerInfo]) -> dict[str, nn.Module]:
    """Return the blocks by name, in the network's order; the whole network when it has none."""
    found: dict[str, nn.Module] = {}
    for name, child in module.named_modules():
        inside = any(name.startswith(f"{block}.") for block in found)
        if isinstance(child, nn.ModuleList) and not inside:
            for key, element in child.named_children():
                full = f"{name}.{key}" if name else key
                if any(layer == full or layer.startswith(f"{full}.") for layer in layers):
                    found[full] = element
    return found or {"": module}


def left_weights(module: nn.Module) -> dict[str, str]:
    """Return weights that are matrices but no linear layer, with the reason why they are left."""
    linear = {id(get_parameter(child)) for child in module.modules() if is_linear(child)}
    found: dict[str, str] = {}
    for name, parameter in module.named_parameters():
        if parameter.ndim < 2 or id(parameter) in linear:
            continue
        owner = module.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, nn.Embedding):
            found[name] = "embedding"
        elif parameter.ndim == 3:
            found[name] = f"3-D weight of {type(owner).__name__} (fused experts): not supported yet"
        else:
            found[name] = f"{parameter.ndim}-D weight of {type(owner).__name__}"
    return found


def is_linear(module: nn.Module) -> bool:
    """Return whether a module computes x W^T + b with a plain weight."""
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def get_parameter(module: nn.Module) -> nn.Parameter:
    """Return the weight parameter of a linear module."""
    parameter = module._parameters["weight"]
    if parameter is None:
        raise ModelError(f"{type(module).__name__} has no weight")
    return parameter


def _rows(weight: torch.Tensor, layer: str, rows: slice) -> torch.Tensor:
    found = weight[rows].to(torch.float32).contiguous()
    check_finite(found, f"some rows of the weight of layer {layer!r}")
    return found


def get_weight(module: nn.Module) -> torch.Tensor:
    """Return the weight of a linear module as [rows, columns]."""
    weight = get_parameter(module).data
    return weight.T if _is_conv1d(module) else weight


def set_weight(module: nn.Module, weight: torch.Tensor) -> None:
    """Put a weight [rows, columns] in place of the module's own."""
    stored = weight.T.contiguous() if _is_conv1d(module) else weight
    module._parameters["weight"] = nn.Parameter(stored, requires_grad=False)


def _is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, whose weight is stored [columns, rows]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _meta(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(
        torch.empty_like(parameter, device="meta"),
        requires_grad=False,
    )
