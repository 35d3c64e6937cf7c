"""A real Chromium, driven by playwright, in which the page is tried. Needs `pip install playwright` and a
system's chromium; without either its tests are skipped."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
PATIENCE_MS = 20_000
# The answer to a chat request, streamed by the browser itself: pieces, so many milliseconds apart.
CANNED = """([pieces, pause, end]) => {
  const real = window.fetch, encoder = new TextEncoder();
  const line = (chunk) => encoder.encode(`data: ${JSON.stringify(chunk)}\\n\\n`);
  const choice = (delta, finish_reason = null) => ({ choices: [{ index: 0, delta, finish_reason }] });
  window.asked = [];
  window.fetch = (path, options) => {
    if (!String(path).endsWith("chat/completions")) return real(path, options);
    window.asked.push(JSON.parse(options.body));
    let at = 0;
    const body = new ReadableStream({
      async pull(controller) {
        if (options.signal.aborted) return controller.error(new DOMException("stopped", "AbortError"));
        if (at === 0) controller.enqueue(line(choice({ role: "assistant", content: null })));
        if (at < pieces.length) {
          if (pause) await new Promise((over) => setTimeout(over, pause));
          const piece = pieces[at++];
          return controller.enqueue(line(choice(typeof piece === "string" ? { content: piece } : piece)));
        }
        controller.enqueue(line(choice({}, end.finish)));
        controller.enqueue(line({ choices: [], usage: end.usage }));
        controller.close();
      },
    });
    return Promise.resolve(new Response(body));
  };
}"""
USAGE = {
    "prompt_tokens": 20, "completion_tokens": 5, "total_tokens": 25,
    "prompt_tokens_details": {"cached_tokens": 12},
    "outsize": {"tokens_per_s": 41.7, "first_token_s": 0.25, "bytes_read": 5_000_000, "hit_rate": 0.5},
}  # fmt: skip


class Tab:
    """A page, with all that it asked for and all that it complained about."""

    def __init__(self, page: Any, url: str) -> None:
        self.page, self.url = page, url
        self.asked: list[str] = []
        self.said: list[str] = []
        page.set_default_timeout(PATIENCE_MS)
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("console", lambda message: self.said.append(message.text))
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("dialog", lambda dialog: dialog.accept())

    def open(self) -> Tab:
        self.page.goto(self.url)
        self.page.wait_for_selector("#model option", state="attached")
        return self

    def canned(self, pieces: Sequence[object], pause_ms: int = 0, finish: str = "stop") -> None:
        """From now on the browser answers chat requests with these pieces."""
        end = {"finish": finish, "usage": USAGE}
        self.page.evaluate(CANNED, [list(pieces), pause_ms, end])

    def sampling(self, **options: object) -> None:
        """What is sent with each request from now on."""
        self.page.evaluate(
            "(o) => { localStorage['outsize.sampling'] = JSON.stringify(o); }", options
        )

    def ask(self, text: str, wait: bool = True) -> None:
        self.page.fill("#box", text)
        self.page.press("#box", "Enter")
        if wait:
            self.done()

    def done(self) -> None:
        """Wait until no answer is under way."""
        self.page.wait_for_selector("#send:text-is('Send')")
        self.page.wait_for_selector("article.assistant footer button:text-is('Regenerate')")

    def press(self, name: str, within: str = "article.assistant:last-child") -> None:
        self.page.click(f"{within} button:text-is('{name}')")

    def text(self, selector: str = "article.assistant:last-child .text") -> str:
        return str(self.page.inner_text(selector))

    def kept(self) -> list[dict[str, Any]]:
        """The conversations in the browser's storage."""
        kept: dict[str, str] = self.page.evaluate("({...localStorage})")
        return [json.loads(kept[name]) for name in kept if name.startswith("outsize.chat.")]

    def check(self) -> None:
        """It asked nobody but its server, and had nothing to complain about."""
        away = [url for url in self.asked if not url.startswith((self.url, "blob:", "data:"))]
        assert (away, self.said) == ([], [])


@contextmanager
def chromium() -> Iterator[Any]:
    """Skips the test where there is none."""
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not Path(CHROMIUM).exists():
        pytest.skip("there is no chromium here")
    with driver.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield made
        made.close()


def axe() -> str:
    """axe-core's script: its path is in AXE, or it is in node_modules. Skips the test where it is not."""
    root = Path(__file__).parents[2]
    found = Path(os.environ.get("AXE", root / "node_modules" / "axe-core" / "axe.min.js"))
    if not found.is_file():
        pytest.skip("axe-core is not here: npm install axe-core, or say where in AXE")
    return found.read_text()
