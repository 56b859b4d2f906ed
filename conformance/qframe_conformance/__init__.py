"""Tests for everyone's plugins.

`strategies` has Hypothesis strategies for what plugins are given: schemes, weights, Hessians and
rounding problems, the nasty ones by name. The suite of checks that uses them comes next.

    from hypothesis import given
    from qframe_conformance.strategies import rounding_problems

    @given(rounding_problems())
    def test_codes_are_on_the_grid(problem): ...
"""
