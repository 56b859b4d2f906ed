"""Rounders with a mistake, and the suite."""

from tests.mutants import judged
from tests.mutants.judged import (  # noqa: F401 - these are the tests
    test_names_are_unique_and_bugs_are_sentences,
    test_the_named_check_finds_the_mistake,
    test_the_right_plugin_beside_a_mutant_keeps_the_promise,
    test_what_is_right_passes_everything,
)

pytest_generate_tests = judged.of("rounders", one_in=2)
