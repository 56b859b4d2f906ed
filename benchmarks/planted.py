"""Plant outlier features into a network that stays the same function.

    python benchmarks/planted.py OUT

A few channels of every norm that linear layers read are made FACTOR times as large, and the columns
of the weights that read them as much smaller. FACTOR is a power of two, so in exact arithmetic, and
nearly so in float32, this is the network that it was: what quantization loses by it is the fault of
rounding alone.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from qframe.embedded import model_folder
from qframe.weights import ModelFolder

FACTOR, CHANNELS = 2.0**6, (7, 101, 330, 511)  # 4 of 576, 0.7 %
NORMS = {  # a norm -> the layers that read it
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
LINE = (
    f"{len(CHANNELS)} of 576 channels of every norm that layers read are {FACTOR:g} times as "
    f"large, the weights that read them as much smaller"
)


def planted(folder: Path, out: Path) -> Path:
    """Write the network of `folder` with outlier features to `out`; one that is there stays."""
    if out.exists():
        return out
    scratch = out.with_name(f"{out.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(folder, scratch)
    for file in {tensor.file for tensor in ModelFolder(scratch).tensors.values()}:
        tensors = load_file(file)
        for name in list(tensors):
            block, _, norm = name.removesuffix(".weight").rpartition(".")
            factors = {name: FACTOR} if norm in NORMS else {}
            factors |= {f"{block}.{layer}.weight": 1 / FACTOR for layer in NORMS.get(norm, ())}
            for key, factor in factors.items():
                tensors[key] = tensors[key].clone()
                tensors[key][..., list(CHANNELS)] *= factor
        save_file(tensors, str(file), metadata={"format": "pt"})
    return scratch.rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    print(planted(model_folder(), parser.parse_args().out))


if __name__ == "__main__":
    main()
