"""What other projects' suites print is counted, and a refused field is found (experiments/serve/suites/)."""

from __future__ import annotations

from typing import Any

import pytest

from experiments.serve.suites.record import counts, reasons
from experiments.serve.suites.refused_fields import left_out, named

PYTEST = """\
SKIPPED [2] unit/test_basic.py:13: an endpoint of its own
SKIPPED [1] unit/test_chat.py: an endpoint of its own
XFAIL tests/test_a.py::TestA::test_all_params[loose] - refused by name: audio, store
XFAIL tests/test_a.py::TestA::test_all_params[strict] - refused by name: audio, store
1 failed, 5 passed, 3 skipped, 210 deselected, 2 xfailed in 3.21s
"""


@pytest.mark.parametrize(
    ("printed", "wanted"),
    [
        (PYTEST, {"passed": 5, "failed": 1, "refused": 2, "skipped": 3, "deselected": 210}),
        ("ok  a\n20 passed, 0 failed, 3 refused, 11 left out\n", {"passed": 20, "refused": 3, "skipped": 11}),
        ("Results: 7 passed, 1 failed, 0 skipped, 8 total\n", {"passed": 7, "failed": 1}),
        ("  11656 generated, 11650 passed\n= 2 warnings in 429.31s =", {"passed": 11650, "failed": 6}),
        ("69 log-likelihoods compared, largest difference 4.1e-06", {"passed": 69, "failed": 0}),
        ("69 log-likelihoods compared, largest difference 0.43", {"passed": 0, "failed": 69}),
    ],
)  # fmt: skip
def test_counts(printed: str, wanted: dict[str, int]) -> None:
    found = counts(printed)
    assert {kind: found[kind] for kind in wanted} == wanted


def test_a_suite_that_was_cut_off_is_no_result() -> None:
    with pytest.raises(IndexError):
        counts("....F...")


def test_reasons() -> None:
    assert reasons(PYTEST) == {
        "an endpoint of its own": 3,
        "test_all_params: refused by name: audio, store": 2,
    }


@pytest.mark.parametrize(
    ("error", "rest"),
    [
        ({"message": "no", "param": "tools.0.defer_loading"}, {"tools": [{"name": "a"}], "n": 1}),
        ({"message": "n: at least 2"}, {"tools": [{"name": "a", "defer_loading": True}]}),
    ],
)
def test_a_refused_field_is_left_out(error: dict[str, Any], rest: dict[str, Any]) -> None:
    body = {"tools": [{"name": "a", "defer_loading": True}], "n": 1}
    left_out(body, named(error))
    assert body == rest


def test_an_error_must_name_a_field_that_was_sent() -> None:
    with pytest.raises(LookupError):
        left_out({"n": 1}, named({"message": "a reply cannot do both; give one"}))
