"""Evaluation against cases whose answer is known on paper (docs/bounds.md, B11)."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qframe import bounds
from qframe.errors import NonFiniteError
from qframe.evaluation import evaluate, score_tokens

VOCABULARY = 50


class Table(nn.Module):
    """A network whose logits depend on the current token alone."""

    def __init__(self, logits):
        super().__init__()
        self.table = logits

    def forward(self, tokens):
        return self.table[tokens]


def windows(seed, count=3, length=20):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (count, length), generator=generator)


def logits(seed, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(VOCABULARY, VOCABULARY, generator=generator) * spread


def roundoff(size):
    """Of a log-softmax over the vocabulary of logits of this size, and of a mean of them."""
    return bounds.gamma(2 * VOCABULARY + 8) * (1 + size)


def test_constant_logits_have_the_perplexity_of_the_vocabulary():
    flat = Table(torch.zeros(VOCABULARY, VOCABULARY))
    score = evaluate({"same": flat}, flat, windows(0))["same"]
    assert abs(score.nll - math.log(VOCABULARY)) <= roundoff(math.log(VOCABULARY))
    assert (score.kl_mean, score.kl_p99, score.top1) == (0, 0, 1)


@pytest.mark.parametrize("c", [0.5, 3.0, 12.0])
def test_planted_labels_score_the_next_token_and_no_other(c):
    """Logit c for the next token: perplexity 1 + (V - 1) e^-c. Unshifted labels miss it."""
    line = torch.arange(VOCABULARY)[None]
    table = torch.zeros(VOCABULARY, VOCABULARY)
    table[torch.arange(VOCABULARY - 1), torch.arange(1, VOCABULARY)] = c
    score = evaluate({}, Table(table), line)[""]
    expected = math.log(1 + (VOCABULARY - 1) * math.exp(-c))
    assert abs(score.nll - expected) <= roundoff(c)
    assert score.perplexity == math.exp(score.nll)


def test_kl_is_that_of_the_reference_to_the_candidate_in_nats():
    p, q = 0.9, 0.3
    tokens = torch.zeros(1, 5, dtype=torch.int64)
    two = {
        name: Table(torch.tensor([[math.log(x), math.log(1 - x)]]).expand(VOCABULARY, 2))
        for name, x in (("p", p), ("q", q))
    }
    score = evaluate({"q": two["q"]}, two["p"], tokens)["q"]
    expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    backwards = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
    assert abs(score.kl_mean - expected) <= roundoff(3)
    assert abs(score.kl_mean - backwards) > roundoff(3)
    assert score.top1 == 0


@given(seed=st.integers(0, 999), noise=st.floats(0, 4))
def test_kl_lies_between_pinsker_and_hoeffding(seed, noise):
    z, dz = logits(seed, 3), logits(seed + 1000, noise)
    tokens = windows(seed, 1)
    log_p, log_q = (torch.log_softmax(x[tokens[0]], -1) for x in (z, z + dz))
    scores = score_tokens(log_q, log_p, tokens)
    change = dz[tokens[0][:-1]].double()
    oscillation = change.amax(1) - change.amin(1)
    distance = (log_p[:-1].double().exp() - log_q[:-1].double().exp()).abs().sum(1) / 2
    slack = roundoff(12 + float(oscillation.max()))
    assert bool((scores.kl <= oscillation.square() / 8 + slack).all())
    assert bool((scores.kl >= 2 * distance.square() - slack).all())
    assert bool(
        ((scores.nll - score_tokens(log_p, log_p, tokens).nll).abs() <= oscillation + slack).all()
    )


def test_a_constant_added_to_all_logits_changes_nothing_but_rounding():
    tokens = windows(4)
    shifted = Table(logits(4) + 7)
    score = evaluate({"shifted": shifted}, Table(logits(4)), tokens)["shifted"]
    assert abs(score.kl_mean) <= roundoff(12)
    assert score.top1 == 1


def test_the_standard_error_is_that_of_the_mean_over_windows():
    tokens = windows(6, count=8)
    table = Table(logits(6, 3))
    score = evaluate({}, table, tokens)[""]
    each = [evaluate({}, table, w)[""].nll for w in tokens.split(1)]
    spread = torch.tensor(each).double().std() / math.sqrt(len(each))
    expected = float(spread) * math.exp(sum(each) / len(each))
    assert abs(score.perplexity_stderr - expected) <= expected * roundoff(1)


def test_threads_and_company_do_not_change_a_score():
    tokens = windows(7)
    reference, one, two = (Table(logits(s)) for s in (1, 2, 3))
    together = evaluate({"one": one, "two": two}, reference, tokens, threads=3)
    alone = evaluate({"two": two}, reference, tokens, threads=1)
    assert together["two"] == alone["two"]


def test_logits_that_are_not_numbers_are_named():
    bad = logits(8)
    bad[3, 4] = torch.nan
    tokens = torch.full((1, 4), 3)
    with pytest.raises(NonFiniteError, match="'bad' gives logits"):
        evaluate({"bad": Table(bad)}, Table(logits(8)), tokens)
