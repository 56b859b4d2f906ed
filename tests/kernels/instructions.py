"""Run every numba kernel as it is compiled for some processor, and print what came out.

The processor is that of NUMBA_CPU_NAME and NUMBA_CPU_FEATURES. Weights and caches have the bits
that the first argument names, such as 48; each is compiled anew. Prints one line of JSON: digests
of the answers that are the same bits everywhere, the worst error over what is allowed of the
others, and the instructions that the product of codes was compiled to.
"""

import hashlib
import json
import sys

import numpy as np
import torch

from qframe import KVScheme, Scheme
from qframe.host import Host
from qframe.kernel_judges import judge
from qframe.kernels import OPS, arithmetic_of, run
from qframe_conformance import kernel_draws, kernel_draws_int8, kernel_draws_other
from qframe_plugins.kernels.numba_cpu import int8_products

SAME = ("quantize_activations", "linear_int8", "linear_int8_groups")
INSTRUCTIONS = ("vpdpbusd", "vpmaddwd", "pmaddwd")
REGISTERS = ("zmm", "ymm", "xmm")


ANY = 0  # bits of what has no codes of its own


def drawn(rng):
    """Yield (operation, bits, operands), shapes that no tile divides among them."""
    for columns in (1, 63, 64, 130, 577, 2100):
        yield "quantize_activations", ANY, kernel_draws_int8.activations(rng, columns)
    for tokens, columns, rows in (
        (1, 4, 64),
        (2, 130, 70),
        (7, 2100, 65),
        (55, 64, 129),
        (9, 1, 3),
    ):
        yield "linear_int8", ANY, kernel_draws_int8.codes(rng, tokens, columns, rows)
    for bits, size, symmetric in ((2, 32, True), (3, 7, False), (4, 128, False), (8, None, True)):
        strategy = "channel" if size is None else "group"
        scheme = Scheme(num_bits=bits, group_size=size, symmetric=symmetric, strategy=strategy)
        for shape in ((1, 64, 3), (13, 700, 70), (2, 131, 66), (4, 300, 65)):
            yield "linear_int8_groups", bits, kernel_draws_int8.groups(rng, *shape, scheme)
        weight = kernel_draws.weight(rng, scheme, 70, 130)
        yield "dequantize", bits, weight
        x = kernel_draws.activations(rng, 130, scheme.group_width(130))
        yield "linear_weight_only", bits, {"x": x, **weight}
        for few in (1, 2, 4):
            yield "linear_weight_only", bits, {"x": x[:few], **weight}
    for columns, rows, threshold in ((130, 70, 6.0), (64, 3, 0.0), (300, 129, 1.0)):
        yield "linear_int8_outliers", ANY, kernel_draws_int8.outliers(rng, columns, rows, threshold)
    for bits, size, axes in (
        (2, 32, ("channel", "token")),
        (4, 8, ("token", "channel")),
        (8, 100, ("channel", "token")),
        (3, 16, ("token", "token")),
    ):
        keys, values = (KVScheme(num_bits=bits, axis=axis, group_size=size) for axis in axes)
        values = values.replace(symmetric=True)
        operands = kernel_draws_other.attention(rng, (4, 2), 150, 80, keys, values)
        yield "attention_kv", bits, operands
    yield "hadamard", ANY, kernel_draws_other.hadamard(rng, 192, 64)
    yield "rms_norm", ANY, kernel_draws_other.norm(rng, 579)
    for tokens, width in ((40, 64), (33, 20)):
        newest = kernel_draws_other.newest(rng, (6, 2), tokens, width, width**-0.5)
        yield "attention_rotary", ANY, newest
    yield "hessian_update", ANY, kernel_draws_other.moments(rng, 70, 131, whole=False)


def parts_of(made):
    return made if isinstance(made, tuple) else (made,)


def main():
    host = Host.discover()
    rng = np.random.default_rng(0)
    wanted = {ANY, *map(int, sys.argv[1])}
    digests, worst = {}, {}
    for name, bits, operands in drawn(rng):
        if bits not in wanted:
            continue
        kernel = host.get("kernel", f"{name}/numba")
        op = OPS[name]
        tensors = [
            torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value
            for value in (operands[operand.name] for operand in op.operands)
        ]
        made = run(kernel, tensors)
        answer = [np.asarray(part) for part in parts_of(made)] if made is not None else ()
        if name in SAME:
            state = digests.setdefault(f"{name} {bits}", hashlib.sha256())
            for part in answer:
                finite = np.where(np.isfinite(part), part, 0) if part.dtype.kind == "f" else part
                state.update(np.ascontiguousarray(finite).tobytes())
        if op.in_place:
            answer = tuple(np.asarray(tensors[i]) for i, o in enumerate(op.operands) if o.in_place)
        for theorem, comparison in judge(name, operands, answer, arithmetic_of(kernel)).items():
            worst[theorem] = max(worst.get(theorem, 0.0), comparison.ratio)
    panels = int8_products._share_panels
    assembly = panels.inspect_asm(panels.signatures[0])
    print(
        json.dumps(
            {
                "same": {name: state.hexdigest() for name, state in digests.items()},
                "worst": worst,
                "instructions": [word for word in INSTRUCTIONS if f"\t{word}" in assembly],
                "registers": [word for word in REGISTERS if f"%{word}" in assembly],
            }
        )
    )


if __name__ == "__main__":
    main()
