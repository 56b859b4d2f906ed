"""docs/bounds.md and qframe.bounds say the same."""

import inspect
import re
from pathlib import Path

import numpy as np
import pytest

from qframe import bounds

DOCUMENT = (Path(__file__).parents[1] / "docs" / "bounds.md").read_text(encoding="utf-8")
HELPERS = {"gamma", "ratio"}  # explained under the notation, not theorems
FUNCTIONS = {
    name: function
    for name, function in vars(bounds).items()
    if inspect.isfunction(function) and not name.startswith("_")
}


@pytest.mark.parametrize("name", sorted(FUNCTIONS.keys() - HELPERS))
def test_every_bound_is_proved_in_the_document(name):
    assert f"`{name}`" in DOCUMENT


@pytest.mark.parametrize("name", sorted(FUNCTIONS.keys() - HELPERS - {"ideal_scale"}))
def test_every_bound_names_a_theorem_that_the_document_has(name):
    theorems = re.findall(r"\bB\d+\.[a-z]\b", inspect.getdoc(FUNCTIONS[name]))
    assert theorems
    assert all(re.search(rf"^### {t} ", DOCUMENT, re.MULTILINE) for t in theorems)


def test_the_document_names_no_bound_that_is_not_there():
    named = set(re.findall(r"\(`(\w+)`\)", DOCUMENT))
    assert named <= FUNCTIONS.keys()


def test_the_counterexample_of_b3_c_is_one():
    hessian = np.array([[5.0, 4, 4], [4, 6, 6], [4, 6, 13]])
    weight = np.array([-0.1, -0.45, 0.3])
    loss = [float((q - weight) @ hessian @ (q - weight)) for q in ([0, -1, 1], [0, 0, 0])]
    assert [round(x, 3) for x in loss] == [3.735, 0.935]


def test_no_number_that_is_not_one_passes():
    assert bounds.ratio([np.nan], [1.0]) == np.inf
    assert bounds.ratio([1.0], [np.nan]) == np.inf
    assert bounds.ratio([0.0], [0.0]) == 0
    assert bounds.ratio([1.0], [-1.0]) == np.inf
