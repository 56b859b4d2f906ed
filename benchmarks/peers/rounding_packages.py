"""Run the packages `hqq` or `auto-round` on a model folder; save the weights that they decode to.

    PEERS/bin/python benchmarks/peers/rounding_packages.py hqq MODEL out.safetensors --bits 3
    PEERS/bin/python benchmarks/peers/rounding_packages.py autoround MODEL out.safetensors \
        --bits 3 --tokens tokens.npy

benchmarks/peers/README.md says how PEERS is made; auto-round==0.15.1 goes there as well.

MODEL       a Hugging Face folder; loaded in float32
out         float32 safetensors: module name -> dequantized weight, of every linear layer but the
            head
tokens.npy  int64 [windows, length], all of them calibrate

The scheme is asymmetric in groups of `--group-size` inputs. hqq: its defaults, so a zero point that
is a float, but with `--whole-zero-points` the `round_zero` that it has for 4 bits. auto-round: its
defaults, 200 iterations of sign descent on the error of a block, on the CPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer


def linears(model: nn.Module) -> Mapping[str, nn.Linear]:
    """Return the linear layers but the head, by name."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


def by_hqq(model: nn.Module, options: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Quantize each weight with hqq's own quantizer."""
    from hqq.core.quantize import Quantizer

    found = {}
    for name, module in linears(model).items():
        packed, meta = Quantizer.quantize(
            module.weight.data,
            nbits=options.bits,
            group_size=options.group_size,
            optimize=True,
            round_zero=options.whole_zero_points,
            axis=1,
            device="cpu",
            compute_dtype=torch.float32,
        )
        found[name] = Quantizer.dequantize(packed, meta)
    return found


def by_autoround(model: nn.Module, options: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Tune the model with auto-round's own quantizer, which leaves what it decodes to in it."""
    from auto_round import AutoRound

    tokens = torch.from_numpy(np.load(options.tokens))
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    quantizer = AutoRound(
        model,
        tokenizer,
        bits=options.bits,
        group_size=options.group_size,
        sym=False,
        iters=options.iterations,
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        dataset=list(tokens.split(8)),
        device_map="cpu",
        enable_torch_compile=False,
    )
    made, _ = quantizer.quantize()
    return {name: module.weight.data for name, module in linears(made).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("package", choices=["autoround", "hqq"])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--tokens", type=Path)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--whole-zero-points", action="store_true")
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    original = {name: module.weight.data.clone() for name, module in linears(model).items()}
    made = {"hqq": by_hqq, "autoround": by_autoround}[options.package](model, options)
    if alike := [name for name, weight in original.items() if torch.equal(weight, made[name])]:
        raise SystemExit(f"{options.package} left {len(alike)} layers alone: {alike[0]}, ...")
    save_file({name: made[name].float().contiguous() for name in original}, options.out)


if __name__ == "__main__":
    main()
