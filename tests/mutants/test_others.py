"""Formats, handlers, observers and caches with a mistake, and the suite."""

from tests.mutants import judged
from tests.mutants.judged import (  # noqa: F401 - these are the tests
    test_names_are_unique_and_bugs_are_sentences,
    test_the_named_check_finds_the_mistake,
    test_the_right_plugin_beside_a_mutant_keeps_the_promise,
    test_what_is_right_passes_everything,
)

pytest_generate_tests = judged.of("others")


def test_every_group_has_its_file():
    files = {file.stem.removeprefix("test_") for file in judged.HERE.glob("test_*.py")}
    assert files == judged.GROUPS.keys()
