"""Whatever is in a file that somebody else wrote: it is read, or an error gives the reason."""

import json

import pytest

from qframe.errors import ModelError
from qframe.model import build
from qframe.weights import ModelFolder
from tests.hostile.loaders import LOADERS, one_case

CASES = 25  # in each run; benchmarks/fuzz.py has no end


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LOADERS)
def test_changed_files_are_read_or_refused(name, tmp_path):
    loader = LOADERS[name]
    (tmp_path / "sound").mkdir()
    seed_folder = tmp_path / "sound" / "folder"
    loader.seed(seed_folder)
    loader.load(seed_folder)
    (tmp_path / "scratch").mkdir()
    for seed in range(CASES):
        wrong = one_case(loader, seed_folder, tmp_path / "scratch", seed)
        assert wrong == "", f"seed {seed}: {wrong}"


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_hidden_layers", 10**6), ("vocab_size", 10**9), ("max_position_embeddings", 1 << 40)],
)
def test_sizes_that_no_network_has_are_refused_before_it_is_built(tiny_llama, key, value):
    config = json.loads((tiny_llama / "config.json").read_text())
    (tiny_llama / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(ModelError, match=f"{key} is {value}, more than"):
        build(ModelFolder(tiny_llama))


def test_other_numbers_may_be_as_large_as_they_are(tiny_llama):
    """The base of rotary embeddings is an integer of a hundred million in networks that exist."""
    config = json.loads((tiny_llama / "config.json").read_text())
    large = {"rope_theta": 10**8, "max_position_embeddings": 10 * 1024**2, "serial": 10**15}
    (tiny_llama / "config.json").write_text(json.dumps({**config, **large}))
    assert build(ModelFolder(tiny_llama)).config.max_position_embeddings == 10 * 1024**2
