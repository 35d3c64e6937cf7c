"""A pytest plugin for tests of OpenAI's and Anthropic's clients that send every field (`_with_all_params`).

A server that ignores no field in silence must refuse some. Such a test counts as an expected failure if every
refusal (400) names a field that was sent, and the request is answered without these; they are its reason.
"""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Generator
from typing import Any

import pytest

MOST = 60  # fields of one request that may be refused
KEPT = {"content-type", "authorization", "x-api-key", "anthropic-version"}


def named(error: dict[str, Any]) -> list[str]:
    """The path of the field that an error is about: OpenAI's has `param`, Anthropic's begins with it."""
    path = error.get("param") or str(error["message"]).partition(":")[0]
    return re.findall(r"\w+", path)


def left_out(body: Any, path: list[str]) -> None:
    """Removes the field. Raises LookupError, ValueError or TypeError if it was not sent."""
    *way, last = path
    for step in way:
        body = body[int(step)] if isinstance(body, list) else body[step]
    del body[last]


def refused(request: Any) -> list[str]:
    """The fields that must be left out until the request is answered."""
    names: list[str] = []
    body = json.loads(request.content)
    headers = {k: v for k, v in request.headers.items() if k.lower() in KEPT}
    while len(names) < MOST:
        again = urllib.request.Request(str(request.url), json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(again, timeout=120) as answer:
                answer.read()
            return names
        except urllib.error.HTTPError as e:
            if e.code != 400:
                raise
            path = named(json.load(e)["error"])
            left_out(body, path)
            names.append(".".join(path))
    raise AssertionError(f"more than {MOST} fields are refused")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[Any]:
    report = yield
    error = call.excinfo.value if call.excinfo else None
    if report.failed and "all_params" in item.name and getattr(error, "status_code", 0) == 400:
        try:
            names = refused(getattr(error, "request", None))
        except Exception as e:  # the test's own failure stays, with this beside it
            report.sections.append(("refused fields", repr(e)))
            return report
        report.outcome, report.wasxfail = "skipped", f"refused by name: {', '.join(names)}"
    return report
