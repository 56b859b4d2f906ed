"""Norms in one call: the same bits, for norms that are such norms, and no others."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

import qframe
from qframe.dispatch import Dispatch
from qframe.fused_norms import FusedRMSNorm, fuse_norms
from qframe.host import Host
from qframe.kernel_judges import judge
from qframe.kernels import ARITHMETICS
from tests.tiny import write_llama

KERNELS = [Host.discover().get("kernel", name) for name in Host.discover().names("kernel")]


def norm_of(kind, columns, seed=0, **others):
    """Return a norm with a weight that is not all ones."""
    made = kind(columns, **others)
    made.weight.data = torch.randn(columns, generator=torch.Generator().manual_seed(seed))
    return made


class NoMean(nn.Module):
    """Divides by the root of the sum of squares."""

    def __init__(self, columns, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(columns)), eps

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + self.eps))


class SmallerEps(NoMean):
    """Adds less than its `eps` says: only where numbers are small does one see it."""

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps / 2))


class Shifted(NoMean):
    """Adds a number for inputs of several tokens alone."""

    def forward(self, x):
        y = self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))
        return y if x[..., 0].numel() == 1 else y + 1


class Embedding(NoMean):
    """Takes tokens, not numbers."""

    def forward(self, x):
        return self.weight[x]


@given(
    kind=st.sampled_from((LlamaRMSNorm, Qwen3RMSNorm)),
    columns=st.integers(1, 600),
    shape=st.sampled_from(((), (0,), (1,), (1, 1), (5,), (2, 0, 3), (2, 7))),
    scale=st.sampled_from((0.0, 1e-30, 1e-4, 1.0, 1e18)),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_bits_are_the_same(kind, columns, shape, scale, seed):
    usual = norm_of(kind, columns, seed)
    fused = fuse_norms(usual)
    assert isinstance(fused, FusedRMSNorm)
    x = scale * torch.randn((*shape, columns), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(fused(x), usual(x))
    for dtype in (torch.bfloat16, torch.float64):
        assert torch.equal(fused(x.to(dtype)), usual(x.to(dtype)))
        assert fused(x.to(dtype)).dtype == usual(x.to(dtype)).dtype


@pytest.mark.parametrize("kind", [Gemma2RMSNorm, NoMean, SmallerEps, Shifted, Embedding])
def test_other_norms_stay(kind):
    other = norm_of(kind, 24, eps=1e-12)
    assert fuse_norms(nn.Sequential(other))[0] is other


def test_what_is_not_one_weight_stays():
    biased = LlamaRMSNorm(8)
    biased.bias = nn.Parameter(torch.zeros(8))
    hooked = LlamaRMSNorm(8)
    hooked.register_forward_hook(lambda *_: None)
    others = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), biased, hooked)
    before = list(others)
    assert list(fuse_norms(others)) == before


def test_a_loaded_network_has_them_and_gives_the_same_logits(tmp_path):
    model = write_llama(tmp_path / "MODEL")
    out = tmp_path / "OUT"
    qframe.quantize(model, {"method": "rtn", "scheme": "W8A16"}, out=out)
    fast, plain = qframe.load(out, kernels="torch"), qframe.load(out)
    norms = [each for each in fast.modules() if isinstance(each, FusedRMSNorm)]
    assert len(norms) == 2 * len(fast.model.layers) + 1
    assert not any(isinstance(each, FusedRMSNorm) for each in plain.modules())
    assert fast.state_dict().keys() == plain.state_dict().keys()
    usual = copy.deepcopy(fast)
    for name, module in list(usual.named_modules()):
        if isinstance(module, FusedRMSNorm):
            usual.set_submodule(name, module.usual)
    ids = torch.arange(9)[None]
    with torch.inference_mode():
        assert torch.equal(fast(ids).logits, usual(ids).logits)


def test_a_network_may_be_moved_and_loaded_into():
    usual = norm_of(LlamaRMSNorm, 16)
    fused = fuse_norms(usual)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    for assign in (False, True):
        state = {"weight": torch.full((16,), 2.0 + assign)}
        fused.load_state_dict(state, assign=assign)
        assert torch.equal(fused(x), fused.usual(x))
        assert torch.equal(fused(x.bfloat16()), fused.usual(x.bfloat16()))
    half = copy.deepcopy(fused).to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(half(x.bfloat16()), half.usual(x.bfloat16()))
    assert torch.equal(half(x), half.usual(x))


@pytest.mark.parametrize("backend", ["auto", "torch"])
@given(columns=st.integers(1, 600), shape=st.sampled_from(((), (0,), (1, 1), (2, 7))))
def test_a_kernel_computes_them_within_the_bound(backend, columns, shape):
    usual = norm_of(LlamaRMSNorm, columns)
    fused = fuse_norms(copy.deepcopy(usual), Dispatch(KERNELS, backend))
    assert fused.kernel.backend == {"auto": "numba"}.get(backend, backend)
    x = torch.randn((*shape, columns), generator=torch.Generator().manual_seed(columns))
    made = fused(x)
    assert made.shape == x.shape
    operands = {"x": x.reshape(-1, columns).numpy(), "weight": usual.weight.detach().numpy()}
    answer = (made.detach().reshape(-1, columns).numpy(),)
    judged = judge("rms_norm", {**operands, "eps": fused.eps}, answer, ARITHMETICS["float32"])
    assert judged["B13.a"].ratio <= 1
    assert torch.equal(fused(x.bfloat16()), usual(x.bfloat16()))


def test_gradients_are_those_of_the_norm():
    usual = norm_of(LlamaRMSNorm, 24)
    fused = fuse_norms(copy.deepcopy(usual), Dispatch(KERNELS))
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(2), requires_grad=True)
    plain = fuse_norms(copy.deepcopy(usual))
    found = [torch.autograd.grad(norm(x).sum(), (x, norm.weight)) for norm in (plain, fused)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    fused.weight.requires_grad_(False)
    assert fused(x.detach()).grad_fn is None


def test_a_backend_without_norms_leaves_them_to_pytorch():
    kernels = [each for each in KERNELS if each.op != "rms_norm"]
    fused = fuse_norms(norm_of(LlamaRMSNorm, 24), Dispatch(kernels))
    assert fused.kernel is None
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(3))
    assert torch.equal(fused(x), fused.usual(x))
