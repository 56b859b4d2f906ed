"""Whatever is in a file that somebody else wrote: it is read, or an error gives the reason."""

import pytest

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
