"""The pass of the network as it was, beside that of the quantized one."""

import filecmp
import math
import threading
from dataclasses import dataclass, field

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import qframe
from qframe import CalibrationData
from qframe.errors import UnsupportedError
from qframe.peak import peak_memory
from qframe.pipeline import plan_job
from qframe.report.measure import Drift, OutputErrors
from qframe.verification import verify
from tests.needy import host_needing

W4 = {"num_bits": 4, "group_size": 16}


def inputs(seed, count, *shape):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for _ in range(count)]


def tokens(seed, count=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 24), generator=generator)


def token_data():
    return CalibrationData(inputs=[(tokens(1),), (tokens(2),)], held_out=[(tokens(3),)])


class Kept:
    """Keeps the pairs that it is shown."""

    def __init__(self, columns):
        self.columns, self.pairs = columns, []

    def update(self, x):
        self.pairs.append(x.clone())

    def merge(self, other):
        self.pairs += other.pairs

    def value(self):
        return torch.cat([torch.zeros(0, 2 * self.columns), *self.pairs])


@dataclass(frozen=True)
class Witness:
    """Observes pairs, and remembers by group what it was shown."""

    seen: dict = field(default_factory=dict)
    name: str = "witness"
    pairs = True

    def start(self, group):
        kept = Kept(group.columns)
        self.seen.setdefault(group.name, []).append(kept)
        return kept


NEEDY = {"method": "needy", "scheme": W4, "calibration": {"compute_dtype": "float32"}}


# The pass -------------------------------------------------------------------------------------


def inputs_of_layers(network, batches, layers):
    """Return layer -> its inputs in a forward pass of each batch, [tokens, columns]."""
    found = {name: [] for name in layers}

    def remember(name):
        return lambda module, args: found[name].append(args[0].reshape(-1, args[0].shape[-1]))

    hooks = [
        network.get_submodule(name).register_forward_pre_hook(remember(name)) for name in layers
    ]
    with torch.no_grad(), qframe.parallel.one_torch_thread():
        for batch in batches:
            network(batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def test_pairs_are_the_inputs_of_both_networks(tiny_llama, tmp_path):
    witness = Witness()
    qframe.quantize(
        tiny_llama,
        NEEDY,
        out=tmp_path / "out",
        calibration=token_data(),
        host=host_needing("witness", witness),
        threads=2,
    )
    groups = sorted(witness.seen)
    assert len(groups) == 8  # four of each of the two blocks; the output layer is ignored
    original = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="float32").eval()
    quantized = qframe.load(tmp_path / "out", dequantize=True)
    fitted = [tokens(1), tokens(2)]
    # A statistic for each slot, here a batch; the first of them takes in the others.
    for number, batches in ((0, fitted), (len(fitted), [tokens(3)])):
        there = inputs_of_layers(original, batches, groups)
        here = inputs_of_layers(quantized, batches, groups)
        for name in groups:
            x, y = witness.seen[name][number].value().chunk(2, 1)
            assert torch.equal(y, there[name]), name
            assert torch.equal(x, here[name]), name
    moved = witness.seen["model.layers.1.mlp.down_proj"][0].value().chunk(2, 1)
    assert not torch.equal(*moved)
    assert torch.equal(*witness.seen["model.layers.0.self_attn.q_proj"][0].value().chunk(2, 1))


def test_nothing_is_left_of_it(tiny_llama, tmp_path):
    before = threading.active_count()
    qframe.quantize(
        tiny_llama,
        {"method": "qronos", "scheme": W4},
        out=tmp_path / "out",
        calibration=token_data(),
        threads=1,
    )
    assert threading.active_count() == before


class Twice(nn.Module):
    """Runs a layer twice in a row."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.three = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        return self.three(self.two(self.one(self.one(x))))


class Again(Twice):
    """Runs a layer, another, and the first one again."""

    def forward(self, x):
        return self.three(self.one(self.two(self.one(x))))


class Routed(nn.Module):
    """Sends each token to one of two layers, by what a third says of it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.left, self.right = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        x = self.first(x)
        way = x[:, 0] > x[:, 1]
        return torch.cat([self.left(x[way]), self.right(x[~way])])


@pytest.mark.parametrize(
    ("network", "layer"), [(Again, "three"), (Routed, "left")], ids=["runs-again", "routed"]
)
def test_networks_that_have_no_such_pairs_are_refused(network, layer):
    data = CalibrationData.from_tensors(inputs(1, 3, 200, 16))
    recipe = {"method": "qronos", "scheme": {**W4, "num_bits": 2}, "ignore": []}
    with pytest.raises(UnsupportedError, match=rf"'{layer}'.*ignore"):
        qframe.quantize(network(), recipe, calibration=data)
    assert qframe.quantize(network(), {**recipe, "method": "gptq"}, calibration=data).report


def test_a_layer_that_runs_twice_in_a_row_does_so_with_its_original_weight_in_the_original():
    witness, batches = Witness(), inputs(1, 3, 20, 16)
    data = CalibrationData.from_tensors(batches)
    qframe.quantize(
        Twice(),
        {**NEEDY, "ignore": []},
        calibration=data,
        host=host_needing("witness", witness),
        threads=1,
    )
    network = Twice()
    there = inputs_of_layers(network, batches, ["two", "three"])
    for name in ("two", "three"):
        x, y = witness.seen[name][0].value().chunk(2, 1)
        assert torch.equal(y, there[name])
        assert not torch.equal(x, y)


def test_rewritten_layers_have_pairs_of_rewritten_inputs(tiny_llama, tmp_path):
    """The first group's inputs have not moved, whatever is done to them."""
    witness = Witness()
    qframe.quantize(
        tiny_llama,
        {**NEEDY, "method": "smoothquant+hadamard+needy"},
        out=tmp_path / "out",
        calibration=token_data(),
        host=host_needing("witness", witness),
    )
    plain = inputs_of_layers(
        AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="float32").eval(),
        [tokens(1), tokens(2)],
        ["model.layers.0.self_attn.q_proj"],
    )
    first = witness.seen["model.layers.0.self_attn.q_proj"][0].value()
    assert torch.equal(*first.chunk(2, 1))
    assert not torch.equal(first.chunk(2, 1)[1], plain["model.layers.0.self_attn.q_proj"])


def test_methods_that_do_not_ask_get_no_second_pass():
    passes = []

    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x):
            passes.append(len(x))
            return self.layer(x)

    data = CalibrationData.from_tensors(inputs(1, 2, 20, 16))
    counts = []
    for method in ("gptq", "qronos"):
        passes.clear()
        qframe.quantize(Counted(), {"method": method, "scheme": W4, "ignore": []}, calibration=data)
        counts.append(len(passes))
    assert counts[1] == counts[0] + 2


# The method in the pipeline -------------------------------------------------------------------


def qronos(folder, out, **fields):
    recipe = {"method": "qronos", "scheme": W4, "calibration": {"compute_dtype": "float32"}}
    threads = fields.pop("threads", 2)
    return qframe.quantize(
        folder, {**recipe, **fields}, out=out, calibration=token_data(), threads=threads
    )


def test_files_do_not_depend_on_threads(tiny_llama, tmp_path):
    for threads in (1, 2):
        qronos(tiny_llama, tmp_path / str(threads), threads=threads)
    names = [file.name for file in (tmp_path / "1").iterdir()]
    same, *_ = filecmp.cmpfiles(tmp_path / "1", tmp_path / "2", names, shallow=False)
    assert sorted(same) == sorted(names)


@pytest.mark.parametrize("method", ["qronos", "awq+qronos", "hadamard+qronos"])
def test_certificates_hold_and_can_be_computed_again(tiny_llama, tmp_path, method):
    made = qronos(tiny_llama, tmp_path / "out", method=method, keep_statistics=True)
    for layer in made.report.layers:
        assert all(certificate.holds for certificate in layer.certificates)
        assert "B3.b" in {certificate.theorem for certificate in layer.certificates}
    found = verify(tmp_path / "out", reference=tiny_llama)
    assert not found.problems
    assert not found.unchecked


def test_the_first_group_has_not_moved_and_is_that_of_gptq(tiny_llama, tmp_path):
    for method in ("gptq", "qronos"):
        qronos(tiny_llama, tmp_path / method, method=method, options={"dampening_frac": 0.1})
    one, other = (qframe.load(tmp_path / m).state_dict() for m in ("gptq", "qronos"))
    first = "model.layers.0.self_attn.q_proj.weight_packed"
    last = "model.layers.1.mlp.down_proj.weight_packed"
    assert torch.equal(one[first], other[first])
    assert not torch.equal(one[last], other[last])


def test_a_correction_of_nothing_is_gptq(tiny_llama, tmp_path):
    qronos(tiny_llama, tmp_path / "one", method="gptq", options={"dampening_frac": 0.1})
    qronos(tiny_llama, tmp_path / "other", options={"correction": 0})
    one, other = (qframe.load(tmp_path / n).state_dict() for n in ("one", "other"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_report_says_how_far_outputs_had_moved(tiny_llama, tmp_path):
    layers = {layer.name: layer for layer in qronos(tiny_llama, tmp_path / "out").report.layers}
    assert layers["model.layers.0.self_attn.q_proj"].drift == 0
    last = layers["model.layers.1.mlp.down_proj"]
    assert last.drift > last.error > 0
    plain = qronos(tiny_llama, tmp_path / "plain", method="gptq").report.layers
    assert all(layer.drift is None for layer in plain)


def test_layers_that_overfit_are_judged_by_the_original_outputs(tiny_llama, tmp_path):
    made = qronos(tiny_llama, tmp_path / "out", on_overfit="rtn")
    for layer in made.report.layers:
        fell = layer.method != "qronos"
        assert fell == (layer.held_out_error >= layer.rtn_held_out_error)


def test_errors_of_the_tokens_held_out_are_those_of_fitted_tokens_turned_round(tiny_llama):
    """Rounding to nearest is the same on any text, so the two sets of errors change places."""
    one, other = [(tokens(1),), (tokens(2),)], [(tokens(3),), (tokens(4),)]
    found = []
    for fitted, held_out in ((one, other), (other, one)):
        network = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="float32").eval()
        made = qframe.quantize(
            network,
            NEEDY,
            calibration=CalibrationData(inputs=fitted, held_out=held_out),
            host=host_needing("mismatch"),
        )
        found.append([(m.error, m.held_out_error) for m in made.report.layers])
    assert [(b, a) for a, b in found[0]] == found[1]
    assert all(a != b for a, b in found[0])


@pytest.mark.parametrize(("method", "share"), [("gptq", 1), ("qronos", 2)])
def test_the_second_pass_is_in_the_memory_that_is_predicted(tiny_llama, method, share):
    parts = [
        peak_memory(plan_job(tiny_llama, {"method": each, "scheme": W4}))
        for each in ("gptq", method)
    ]
    for what in ("activations", "statistics"):
        assert parts[1][what] == share * parts[0][what]


def test_a_kept_statistic_of_another_shape_is_named(tiny_llama, tmp_path):
    qronos(tiny_llama, tmp_path / "out", keep_statistics=True)
    name = "model.layers.0.self_attn.q_proj.mismatch"
    [file] = (tmp_path / "out").glob("qframe_statistics*.safetensors")
    tensors = load_file(file)
    tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, file)
    found = [p for p in verify(tmp_path / "out", reference=tiny_llama).problems if p.name == name]
    assert any("is [64, 63], expected [64, 64]" in problem.message for problem in found)


# Output errors --------------------------------------------------------------------------------


def test_errors_are_those_of_the_original_outputs():
    """Integers and 8 tokens: nothing is rounded, so the numbers are equal."""
    generator = torch.Generator().manual_seed(0)
    x, y, w, q = (
        torch.randint(-4, 5, shape, generator=generator).float()
        for shape in ((8, 6), (8, 6), (3, 6), (3, 6))
    )
    gap = y - x
    errors = OutputErrors([x.T @ x / 4], [Drift(gap.T @ x / 4, gap.T @ gap / 4)])
    [[found, moved]] = errors.relative(w, [q, w])

    def size(outputs):
        return float(outputs.square().sum())

    whole = size(x @ w.T)
    assert found == math.sqrt(size(y @ w.T - x @ q.T) / whole)
    assert moved == math.sqrt(size(gap @ w.T) / whole)
    assert errors.drift(w) == moved
    [[plain]] = OutputErrors([x.T @ x / 4]).relative(w, [q])
    assert plain == math.sqrt(size(x @ w.T - x @ q.T) / whole)
