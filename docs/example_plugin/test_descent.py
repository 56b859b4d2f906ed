"""What `descent` promises: it is never worse than rounding to nearest, on any layer."""

from qframe_example_descent import Descent

from qframe import Host


def test_it_keeps_its_promises(qframe_check):
    report = qframe_check(Descent())
    assert "no_worse_than_nearest" in {r.check for r in report.records if r.status == "held"}


def test_more_sweeps_keep_them_too(qframe_check):
    qframe_check(Descent(sweeps=4), profile="fast")


def test_it_is_found_by_its_entry_point():
    assert Host.discover().origin("rounder", "descent").source == "qframe-example-descent"
