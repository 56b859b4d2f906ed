"""Small networks with norms, and handlers whose scales are known."""

import dataclasses

import torch
from torch import nn

import qframe
from qframe import CalibrationData, Capabilities, hookimpl
from qframe.stored import QuantizedLinear

WIDTH = 32
W4 = {"num_bits": 4, "group_size": 8}
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Scales that are no powers of two, and need no statistics."""

    name: str = "stretch"
    needs: frozenset = frozenset()
    capabilities: Capabilities = dataclasses.field(default=Capabilities())

    def rewrite(self, problem, rng):
        return problem.scaled(torch.linspace(0.3, 3, problem.columns))


@dataclasses.dataclass(frozen=True)
class Doubling(Stretch):
    """Scales that are powers of two: nothing is ever rounded."""

    name: str = "doubling"

    def rewrite(self, problem, rng):
        return problem.scaled(2.0 ** (torch.arange(problem.columns) % 5 - 2))


class Plugin:
    @hookimpl
    def qframe_outlier_handlers(self):
        return [Stretch(), Doubling()]


class RMSNorm(nn.Module):
    def __init__(self, width=WIDTH):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * self.normed(x)

    def normed(self, x):
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class OnePlus(RMSNorm):
    def forward(self, x):
        return (1 + self.weight) * self.normed(x)


class Block(nn.Module):
    """Two layers that read a norm, and one that does not."""

    norm_class = RMSNorm

    def __init__(self):
        super().__init__()
        self.norm = self.norm_class()
        self.one, self.two, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        h = self.norm(x)
        return x + self.last(self.one(h) * torch.sigmoid(self.two(h)))


class Stack(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.layers:
            x = block(x)
        return x


def seeded(module, seed=0, dtype=torch.float32):
    """Give every parameter random values; weights of norms lie around 1, on both sides of 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1 and name.endswith("weight"):
            values = 1 + values
        parameter.data = values.to(dtype)
    return module


def data(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 20, WIDTH, generator=generator)
    x[..., 3] *= 30
    return CalibrationData.from_tensors(list(x[1:].to(dtype)), [x[0].to(dtype)])


def quantized(net, host, inputs=None, **changes):
    recipe = {"method": "stretch", "scheme": W4, "min_coverage": 0, **changes}
    out, threads = recipe.pop("out", None), recipe.pop("threads", None)
    inputs = inputs or data()
    return qframe.quantize(net, recipe, calibration=inputs, host=host, out=out, threads=threads)


def scales(module):
    """Return the names of layers that divide when they run."""
    layers = [(n, m) for n, m in module.named_modules() if isinstance(m, QuantizedLinear)]
    return {name for name, layer in layers if layer.input_scale is not None}


def double(tensor):
    return tensor.detach().double().numpy()


KINDS = {
    "rms": RMSNorm,
    "layer": lambda: nn.LayerNorm(WIDTH),
    "torch rms": lambda: nn.RMSNorm(WIDTH),
}


class Plain(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm, self.linear = norm, nn.Linear(WIDTH, 16)

    def forward(self, x):
        return self.linear(self.norm(x))
