"""RMS norms as one call instead of six: of a kernel, or of PyTorch where that gives the same bits.

A network that writes one token at a time spends as long on the small operations of its norms as on
many a layer's product. What transformers spells out, x / sqrt(mean(x^2) + eps) times the weight, is
`torch.nn.functional.rms_norm`; a norm that does anything else, such as Gemma's, which multiplies
by 1 + w, is left as it is. That is found by trying. What is such a norm may as well be computed by
a kernel for `rms_norm`, within the same bound.

Source: Zhang and Sennrich, Root Mean Square Layer Normalization, NeurIPS 2019, arXiv:1910.07467.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional

from qframe.contracts import Kernel, OpCall
from qframe.dispatch import Dispatch
from qframe.errors import UnsupportedError
from qframe.fold_search import may_be_norm
from qframe.model import replace_module

_NAMES = ("variance_epsilon", "eps", "epsilon")  # of what is added to the mean


class FusedRMSNorm(nn.Module):
    """An RMS norm [..., columns] that computes float32 numbers in one call.

    usual    the norm that it stands for: it still computes what has another dtype
    kernel   what computes it where no gradient is asked for; None: PyTorch
    """

    weight: nn.Parameter

    def __init__(self, usual: nn.Module, eps: float, kernel: Kernel | None = None) -> None:
        super().__init__()
        self.kernel = kernel
        self.weight = usual.weight  # type: ignore[assignment]
        self.eps = eps
        self._usual = (usual,)  # no submodule: what is stored keeps its name

    @property
    def usual(self) -> nn.Module:
        """The norm that this one stands for, with the weight of this one."""
        norm = self._usual[0]
        if norm.weight is not self.weight:  # it was assigned, as by load_state_dict(assign=True)
            norm.weight = self.weight
        return norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the norm of x."""
        weight: torch.Tensor = self._parameters["weight"]  # type: ignore[assignment]  # faster
        if x.dtype != torch.float32 or weight.dtype != torch.float32:
            made: torch.Tensor = self.usual(x)
            return made
        learns = (x.requires_grad or weight.requires_grad) and torch.is_grad_enabled()
        if self.kernel is None or learns:
            return functional.rms_norm(x, weight.shape, weight, self.eps)
        if weight.requires_grad:
            weight = weight.detach()
        y: torch.Tensor = self.kernel(x.reshape(-1, x.shape[-1]), weight, self.eps)
        return y.view(x.shape)

    def extra_repr(self) -> str:
        """Return what a printed network shows."""
        return f"{len(self.weight)}, eps={self.eps}"


def fuse_norms(network: nn.Module, dispatch: Dispatch | None = None) -> nn.Module:
    """Put fused norms in place of RMS norms of a network, changed in place, and return it.

    dispatch   finds the kernel that computes them; None: PyTorch does
    """
    for name, module in list(network.named_modules()):
        fused = _fused(module)
        if fused is not None:
            fused.kernel = None if dispatch is None else _kernel(dispatch, len(fused.weight))
            network = replace_module(network, name, fused)
    return network


def _kernel(dispatch: Dispatch, columns: int) -> Kernel | None:
    """Return the kernel for norms of single tokens; None where none serves them."""
    call = OpCall(op="rms_norm", device="cpu", dtype="float32", scheme=None, shape=(1, columns))
    try:
        return dispatch.choose(call)
    except UnsupportedError:  # a backend need not have norms
        return None


def _fused(module: nn.Module) -> FusedRMSNorm | None:
    """Return what gives the same bits as a module in one call; None where nothing does."""
    own = module._parameters
    if not may_be_norm(module) or own.get("bias") is not None:
        return None
    eps = next((getattr(module, each) for each in _NAMES if hasattr(module, each)), None)
    if not isinstance(eps, float) or _hooked(module):
        return None
    fused = FusedRMSNorm(module, eps)
    with torch.no_grad():
        for x in _probes(len(fused.weight), fused.weight.device):
            try:
                expected = module(x)
            except (LookupError, RuntimeError, TypeError, ValueError):  # it takes other inputs
                return None
            if not isinstance(expected, torch.Tensor) or not torch.equal(fused(x), expected):
                return None
    return fused


def _hooked(module: nn.Module) -> bool:
    """Return whether somebody waits for this very module to be called."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _probes(columns: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Yield inputs of one token and of several, for which eps is all, much, little and nothing."""
    generator = torch.Generator().manual_seed(0)
    for scale in (0.0, 1e-6, 1e-3, 1.0, 1e6):
        for shape in ((1, 1, columns), (2, 3, columns)):
            x = scale * torch.randn(shape, generator=generator)
            x[:, 1:, 0] *= 1000  # an outlier
            yield x.to(device)
