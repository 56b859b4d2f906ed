"""The torch kernels with one mistake each in their source, and killed by the suite."""

from __future__ import annotations

from qframe_plugins.kernels import torch_ops
from tests.mutants import kernels_numba, kernels_source


def mutants(op, *mistakes):
    return kernels_source.mutants(torch_ops, "torch_native", op, mistakes)


MUTANTS = (
    *mutants(
        "linear_int8",
        (
            "strides_that_mean_nothing",
            "layout.py",
            "if min(tensor.shape) > 1:",
            "if True:",
            "few_tokens",
            "a single row is handed over with the stride that it has.",
        ),
    ),
    *mutants(
        "linear_int8_groups",
        (
            "tokens_in_another_order",
            "groups.py",
            "return x if order is None else x.index_select(1, order)",
            "return x",
            "eight_bit_groups",
            "groups of scattered columns meet the tokens' columns as they lie.",
        ),
        (
            "first_columns_for_all",
            "groups.py",
            "        first += steps.shape[1]",
            "        first += 0",
            "eight_bit_groups",
            "every group meets the columns of the first.",
        ),
        (
            "steps_wrap_round",
            "groups.py",
            "if torch.iinfo(d).min <= low and high <= torch.iinfo(d).max",
            "if True",
            "eight_bit_groups",
            "steps beyond a byte wrap round.",
        ),
        (
            "token_scale_forgotten",
            "groups.py",
            "return y.mul_(x_scale[:, None])",
            "return y",
            "eight_bit_groups",
            "the scale of the token is not applied.",
        ),
    ),
    *mutants(
        "linear_weight_only",
        (
            "ragged_groups_backwards",
            "groups.py",
            "spread = torch.tensor(self.counts",
            "spread = torch.tensor(self.counts[::-1]",
            "weight_only_sums",
            "the shorter group is taken for the first, not the last.",
        ),
    ),
    *mutants(
        "attention_kv",
        (
            "signed_codes_from_zero",
            "attention.py",
            "numbers += scheme.grid.qmin",
            "numbers += 0",
            "attention_output",
            "symmetric codes are taken to begin at zero.",
        ),
        (
            "second_word_forgotten",
            "attention.py",
            "return (high | low) >>",
            "return low >>",
            "attention_output",
            "the bits of a code that lie in the next word are dropped.",
        ),
        (
            "last_tokens",
            "attention.py",
            "[:, :, :tokens]",
            "[:, :, -tokens:]",
            "attention_output",
            "of the last group of tokens those behind are kept, not those before.",
        ),
        (
            "keys_of_another_head",
            "attention.py",
            "q.reshape(batch, k.shape[1], heads // k.shape[1], width)",
            "q.reshape(batch, heads // k.shape[1], k.shape[1], width).transpose(1, 2)",
            "attention_output",
            "query heads take turns with the keys, instead of sharing them with neighbours.",
        ),
        (
            "lse_of_weights",
            "attention.py",
            "logits.logsumexp(-1)",
            "logits.softmax(-1).logsumexp(-1)",
            "attention_denominator",
            "the logarithm is taken of the weights, not of the logits.",
        ),
    ),
)
TWINS = ()


def outputs(plugin):
    """Ordinary weights, tokens and caches."""
    return kernels_numba.OUTPUTS[plugin.op](plugin)
