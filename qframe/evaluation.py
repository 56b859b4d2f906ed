"""Step 7, evaluation: perplexity, KL divergence and agreement, never without their protocol.

For a token with reference distribution p and quantized distribution q (over the vocabulary):

    NLL = -log q(next token)          perplexity = exp(mean NLL)
    KL  = sum p log(p / q)            nats, in this direction: what is lost by using q for p
    top-1 agreement: argmax p == argmax q

The standard error is that of the mean over windows, because tokens of one window are not
independent.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from qframe import parallel
from qframe.calibration import read_text, tokenize
from qframe.errors import CalibrationError, NonFiniteError
from qframe.positions import EVALUATION_WINDOW, window_length

TOKENS_AT_ONCE = 16  # whose distributions over a large vocabulary still fit the caches


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Everything that a perplexity depends on besides the weights.

    kv_chunk   tokens that networks with a quantized KV cache read at a time; 0: there are none
    """

    text: str
    text_sha256: str
    tokenizer: str
    window: int
    stride: int
    windows: int
    tokens_scored: int
    special_tokens: str = "none"
    normalization: str = "per token"
    compute_dtype: str = "float32"
    kv_chunk: int = 0

    def line(self) -> str:
        """Return the protocol as one line."""
        return (
            f"{self.text} (sha256 {self.text_sha256[:12]}), tokenizer {self.tokenizer}, "
            f"{self.windows} windows of {self.window} tokens, stride {self.stride}, "
            f"{self.tokens_scored} tokens scored, special tokens: {self.special_tokens}, "
            f"{self.normalization}, {self.compute_dtype}"
            + (f", through a KV cache {self.kv_chunk} tokens at a time" if self.kv_chunk else "")
        )


@dataclass(frozen=True, kw_only=True)
class Score:
    """How a network does; the `kl` and `top1` fields compare it with the reference."""

    perplexity: float
    perplexity_stderr: float
    nll: float
    kl_mean: float
    kl_p99: float
    top1: float

    def record(self) -> dict[str, float]:
        """Return the score as plain values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """Per-token results of one window: nll [tokens-1], kl and same_top1 [tokens-1]."""

    nll: torch.Tensor
    kl: torch.Tensor
    same_top1: torch.Tensor


def windows_of(
    folder: Path, dataset: str = "topics", *, length: int | None = None, limit: int | None = None
) -> tuple[torch.Tensor, Protocol]:
    """Return evaluation windows [windows, length] int64 from the start of a text, and protocol.

    dataset   as for calibration; "topics" here means the half of Python's documentation that
              calibration never sees
    length    tokens of a window; None: 512, or what the network was made for where that is less

    Raises CalibrationError when the text is shorter than one window, or a window that was asked for
    longer than the network was made for.
    """
    length = window_length(folder, length, EVALUATION_WINDOW, "window")
    documents = read_text(dataset, part="evaluation")
    tokens = tokenize(folder, documents)
    count = len(tokens) // length
    if count < 1:
        raise CalibrationError(
            f"evaluation text {dataset!r} has {len(tokens)} tokens, fewer than one window of "
            f"{length}; give more text or a shorter window"
        )
    count = min(count, limit or count)
    windows = torch.from_numpy(tokens[: count * length].reshape(count, length))
    protocol = Protocol(
        text=f"{dataset} (evaluation half)" if dataset == "topics" else dataset,
        text_sha256=hashlib.sha256("\0".join(documents).encode()).hexdigest(),
        tokenizer=folder.name,
        window=length,
        stride=length,
        windows=count,
        tokens_scored=count * (length - 1),
    )
    return windows, protocol


def evaluate(
    candidates: Mapping[str, nn.Module],
    reference: nn.Module,
    windows: torch.Tensor,
    *,
    threads: int | None = None,
) -> dict[str, Score]:
    """Score networks against a reference on the same windows; the reference scores itself too.

    candidates   name -> network that maps tokens [1, length] to logits [1, length, vocabulary]
    windows      [windows, length] int64

    Returns the scores by name, the reference under "". Raises NonFiniteError when a network
    gives logits that are not numbers.
    """
    pieces = list(windows.split(1))

    def one_window(window: torch.Tensor) -> dict[str, TokenScores]:
        with torch.no_grad():
            base = _log_probabilities(reference, window, "the reference")
            found = {"": score_tokens(base, base, window)}
            for name, network in candidates.items():
                mine = _log_probabilities(network, window, repr(name))
                found[name] = score_tokens(mine, base, window)
        return found

    with parallel.one_torch_thread():
        results = parallel.spread(one_window, pieces, threads or parallel.default_threads())
    return {name: summarize([r[name] for r in results]) for name in ["", *candidates]}


def score_tokens(log_q: torch.Tensor, log_p: torch.Tensor, window: torch.Tensor) -> TokenScores:
    """Score the prediction of every token but the first.

    log_q, log_p   [length, vocabulary] float32 log-probabilities, quantized and reference
    window         [1, length] tokens
    """
    log_q, log_p, following = log_q[:-1], log_p[:-1], window[0, 1:]
    nll = -log_q.gather(1, following[:, None])[:, 0].double()
    kl, same = [], []
    for q, p in zip(log_q.split(TOKENS_AT_ONCE), log_p.split(TOKENS_AT_ONCE), strict=True):
        kl.append((p.exp() * (p - q)).sum(1, dtype=torch.float64))
        same.append(q.argmax(1) == p.argmax(1))
    return TokenScores(nll=nll, kl=torch.cat(kl), same_top1=torch.cat(same))


def summarize(windows: Sequence[TokenScores]) -> Score:
    """Return the score over all windows."""
    nll = torch.stack([w.nll for w in windows])
    kl = torch.cat([w.kl for w in windows])
    mean = float(nll.mean())
    spread = float(nll.mean(1).std()) / math.sqrt(len(windows)) if len(windows) > 1 else math.nan
    perplexity = math.exp(min(mean, 700.0))
    return Score(
        perplexity=perplexity,
        perplexity_stderr=perplexity * spread,
        nll=mean,
        kl_mean=float(kl.mean()),
        kl_p99=float(np.quantile(kl.numpy(), 0.99)),
        top1=float(torch.cat([w.same_top1 for w in windows]).double().mean()),
    )


def _log_probabilities(network: nn.Module, window: torch.Tensor, name: str) -> torch.Tensor:
    output: Any = network(window)
    logits = getattr(output, "logits", output)[0].float()
    log_probabilities = torch.log_softmax(logits, dim=-1)
    if not bool(torch.isfinite(log_probabilities.sum(dtype=torch.float64))):
        raise NonFiniteError(f"{name} gives logits that are not finite")
    return log_probabilities
