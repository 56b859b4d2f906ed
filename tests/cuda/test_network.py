"""A network whose layers run on the kernels for GPUs, on the CPU."""

import torch

import qframe
from tests.cuda.extra import need_extra
from tests.tiny import write_llama

need_extra()


def test_layers_in_eight_bits_give_the_bits_of_the_cpu_kernels(tmp_path):
    write_llama(tmp_path / "MODEL")
    calibration = {"num_calibration_samples": 2, "max_seq_length": 16}
    recipe = {"method": "rtn", "scheme": "W8A8", "calibration": calibration}
    qframe.quantize(tmp_path / "MODEL", recipe, out=tmp_path / "OUT")
    simulated, cpu = (
        qframe.load(tmp_path / "OUT", kernels=name).model.layers[0].mlp.up_proj
        for name in ("ptx_host", "numba")
    )
    assert simulated.kernels == ("quantize_activations/ptx_host", "linear_int8/ptx_host")
    for tokens in (1, 11):
        x = torch.randn(tokens, simulated.in_features, generator=torch.Generator().manual_seed(0))
        assert torch.equal(simulated(x), cpu(x))
