"""Compiled kernels with a mistake in their source, and the suite: one in four, every night all.

Each is compiled anew, which takes seconds.
"""

from tests.mutants import judged
from tests.mutants.judged import (  # noqa: F401 - these are the tests
    test_names_are_unique_and_bugs_are_sentences,
    test_the_named_check_finds_the_mistake,
    test_the_right_plugin_beside_a_mutant_keeps_the_promise,
    test_what_is_right_passes_everything,
)

pytest_generate_tests = judged.of("compiled", one_in=8)


def test_every_mistake_can_be_made():
    """The text that it changes is there, once."""
    for module in judged.modules("compiled"):
        for mutant in module.MUTANTS:
            assert mutant.make() is not None
