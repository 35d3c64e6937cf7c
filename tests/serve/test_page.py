"""The page in a real Chromium: what people do with it, what a hostile model could, who could not use it."""

from __future__ import annotations

import json
import random
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from outsize.engine.model import Model
from outsize.progress import bars
from tests.serve import browser
from tests.serve.browser import Tab
from tests.serve.conftest import ENDLESS, Running, Serving

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("chromium")]
HOSTILE = """# <img src=x onerror="alert(1)"> </script><script>alert(2)</script>
[bad](javascript:alert(3)) [data](data:text/html,x) [file](file:///etc/passwd) [good](https://example.com/)
![picture](http://example.com/x.png) ![x](javascript:alert(4)) <a href="javascript:alert(5)">raw</a>
<iframe src="javascript:alert(6)"></iframe> <svg onload=alert(7)> <style>*{display:none}</style>

```html
<img src=x onerror=alert(8)><script>alert(9)</script>
```
```"onmouseover=alert(10)
odd
```
| a | <b onclick=alert(11)> |
|---|---|
| [x](vbscript:alert(12)) | b |
"""
MARKS = [
    *"*_`~[]()!<>|#-+$\\ \n", "](", "```", "**", "> ", "- ", "1. ", "| a | b |\n|---|---|\n", "text ",
    "http://x ", "javascript:", "<img src=x onerror=alert(1)>", "wörter 😀 ",
]  # fmt: skip
HIDE = """() => {
  Object.defineProperty(document, "hidden", { value: true, configurable: true });
  document.dispatchEvent(new Event("visibilitychange", { bubbles: true }));
}"""
MOVES = """() => {
  window.most = 0;
  setInterval(() => { window.most = Math.max(window.most, document.getAnimations().length); }, 20);
}"""
INERT = """() => {
  const live = "img, script, iframe, object, embed, style, link, form, svg, video";
  const bad = document.querySelectorAll(`#log :is(${live})`).length;
  const all = [...document.querySelectorAll("#log *")];
  const names = all.flatMap((e) => e.getAttributeNames());
  const handlers = names.filter((name) => name.startsWith("on") || name === "style").length;
  const links = all.filter((e) => e.href).map((e) => new URL(e.href).protocol);
  return [bad, handlers, [...new Set(links)]];
}"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser.chromium() as made:
        yield made


@pytest.fixture
def tab(chromium: Any) -> Iterator[Callable[..., Tab]]:
    """Open pages of a server, each as a new user would; at the end each must have been quiet."""
    with ExitStack() as stack:

        def make(running: Running, **options: Any) -> Tab:
            context = stack.enter_context(chromium.new_context(**options))
            return Tab(context.new_page(), running.url)

        yield make


def test_a_conversation(served: Running, tab: Callable[..., Tab]) -> None:
    page = tab(served).open()
    page.page.evaluate(
        'localStorage[\'outsize.sampling\'] = \'{"max_tokens": 5, "seed": 1, "ignore_eos": true}\''
    )
    page.ask("a b c")
    first = page.text()
    assert "5 tokens" in page.text("article.assistant .account summary")
    page.press("Regenerate")
    page.done()
    assert page.text() == first, "the same seed"
    page.press("Continue")
    page.done()
    assert page.text().startswith(first.strip()[:3])
    page.press("Edit", "article.user")
    page.page.fill("article.user textarea", "c b a")
    page.press("Send", "article.user")
    page.done()
    (kept,) = page.kept()
    assert [m["content"] for m in kept["messages"]][:1] == ["c b a"]
    assert len(kept["messages"]) == 2
    assert page.page.inner_text("#status").startswith("Answer ready, ")
    page.check()


def test_what_is_asked_for(served: Running, tab: Callable[..., Tab]) -> None:
    """System prompt, sampling, an edited answer that is gone on from."""
    page = tab(served).open()
    page.canned(["Hello ", "there"])
    page.page.click("#show-settings")
    page.page.fill("[name=system]", "Be brief.")
    page.page.fill("[name=temperature]", "0")
    page.page.fill("[name=top_k]", "7")
    page.page.fill("[name=stop]", "###")
    page.page.click("#settings button.main")
    page.ask("Hi")
    page.press("Edit")
    page.page.fill("article.assistant textarea", "Hello you")
    page.press("Continue from here")
    page.done()
    first, second = page.page.evaluate("window.asked")
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}
    assert first["messages"] == [system, user]
    assert (first["temperature"], first["top_k"], first["stop"]) == (0, 7, "###")
    assert first["stream_options"] == {"include_usage": True}
    assert "continue_final_message" not in first
    assert second["messages"] == [system, user, {"role": "assistant", "content": "Hello you"}]
    assert (second["continue_final_message"], second["add_generation_prompt"]) == (True, False)
    assert page.text() == "Hello youHello there"
    page.page.click("#show-settings")
    page.page.click("#settings button[value=clear]")
    page.press("Regenerate")
    page.done()
    third = page.page.evaluate("window.asked.at(-1)")
    assert "temperature" not in third
    assert third["messages"] == [user]
    page.check()


def test_an_answer_and_its_account(served: Running, tab: Callable[..., Tab]) -> None:
    page = tab(served).open()
    page.canned(
        [
            {"reasoning_content": "Let me "},
            {"reasoning_content": "see."},
            "**Yes**",
            " and\n\n- one\n- two",
        ]
    )
    page.ask("Well?")
    assert page.page.locator("article.assistant strong").inner_text() == "Yes"
    assert page.page.locator("article.assistant li").count() == 2
    assert not page.page.locator(".thinking div").is_visible(), "closed"
    page.page.click(".thinking summary")
    assert page.text(".thinking div") == "Let me see."
    line = page.text(".account summary")
    assert line == "41.7 tokens/s · first token 0.25 s · 5 tokens · 12 of 20 prompt tokens cached"
    page.page.click(".account summary")
    assert "hit rate" in page.text(".account dl")
    page.check()


def test_conversations_are_kept_exported_and_imported(
    served: Running, tab: Callable[..., Tab], tmp_path: Path
) -> None:
    page = tab(served, accept_downloads=True).open()
    page.canned(["ok"])
    page.page.click("#show-chats") if page.page.locator("#chats").is_hidden() else None
    for text in ("first", "second"):
        page.page.click("#new")
        page.ask(text)
    assert page.page.locator("#list li").count() == 2
    page.page.click("#list button:text-is('first')")
    assert page.text("article.user .text") == "first"
    page.page.reload()
    assert page.text("article.user .text") == "first", "the address names the conversation"
    with page.page.expect_download() as download:
        page.page.click("#export")
    file = tmp_path / "chats.json"
    download.value.save_as(file)
    assert len(json.loads(file.read_text())["conversations"]) == 2
    page.page.click("[aria-label^='Delete “first']")
    assert page.page.locator("#list li").count() == 1
    page.page.set_input_files("#import", file)
    page.page.wait_for_selector("#list li:nth-child(3)")
    file.write_text('{"conversations": [{"messages": [{"role": "user", "content": 1}]}]}')
    page.page.set_input_files("#import", file)
    page.page.wait_for_selector("#banner:has-text('holds no conversations')")
    assert page.page.locator("#list li").count() == 3
    page.check()


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stopping_stops_the_server(
    serve: Serving, endless: Callable[[], Model], tab: Callable[..., Tab], how: str
) -> None:
    running = serve(endless).until_ready()
    page = tab(running).open()
    page.sampling(max_tokens=ENDLESS, ignore_eos=True)
    page.ask("a b c", wait=False)
    page.page.wait_for_selector("article.assistant .text:not(:empty)")
    running.until(lambda: running.load().running == 1, "it is computed")
    page.page.click("#send") if how == "button" else page.page.press("#box", "Escape")
    running.until(lambda: running.load().running == 0, "it is computed no longer")
    page.done()
    assert "Stopped." in page.text("article.assistant footer")
    assert page.page.evaluate("document.activeElement.id") == "box"
    page.check()


def test_a_reload_in_the_middle_keeps_what_was_there(
    served: Running, tab: Callable[..., Tab]
) -> None:
    page = tab(served).open()
    page.canned(["piece "] * 1000, pause_ms=5)
    page.ask("Go", wait=False)
    page.page.wait_for_selector("article.assistant .text:has-text('piece piece')")
    page.page.reload()
    assert page.text().startswith("piece piece")
    assert "Interrupted." in page.text("article.assistant footer")
    page.canned(["end"])
    page.press("Continue")
    page.done()
    assert page.text().endswith("end")
    page.check()


def test_it_waits_for_the_model(
    serve: Serving, tiny: Callable[[], Model], tab: Callable[..., Tab]
) -> None:
    may_open = threading.Event()

    def slowly() -> Model:
        with bars(quiet=True) as progress:
            progress("loading", 2, 5)
        may_open.wait(60)
        return tiny()

    running = serve(slowly)
    page = tab(running)
    page.page.goto(running.url)
    page.page.wait_for_selector("#banner:has-text('loading, 40 %')")
    assert page.page.locator("#banner progress").get_attribute("value") == "0.4"
    page.sampling(max_tokens=3)
    page.ask("too early", wait=False)
    page.page.wait_for_selector("article.assistant .error")
    page.page.wait_for_selector("article.assistant .error:has-text('not ready yet')")
    may_open.set()
    page.page.wait_for_selector("#banner", state="hidden")
    page.press("Try again")
    page.done()
    assert page.page.locator(".error").count() == 0
    assert all("503" in said for said in page.said), "the browser's own lines"


def test_errors_are_the_servers_words(served: Running, tab: Callable[..., Tab]) -> None:
    page = tab(served).open()
    page.sampling(top_p=7)
    page.ask("x", wait=False)
    page.page.wait_for_selector(".error:has-text('top_p')")
    page.sampling()
    page.page.click("#new")
    page.ask("a b c d e " * 1000, wait=False)
    page.page.wait_for_selector(".error:has-text('context'):has-text('Start a new chat')")


def test_a_server_that_ends_is_said(serve: Serving, tab: Callable[..., Tab]) -> None:
    running = serve().until_ready()
    page = tab(running).open()
    running.end()
    page.ask("x", wait=False)
    page.page.wait_for_selector(".error:has-text('still running')")
    page.page.wait_for_selector("#banner:has-text('does not answer')")


def test_a_key_is_asked_for_once(serve: Serving, tab: Callable[..., Tab]) -> None:
    running = serve(api_key="sesame").until_ready()
    page = tab(running).open()
    page.sampling(max_tokens=3)
    for key in ("wrong", "sesame"):
        if key == "wrong":
            page.ask("x", wait=False)
        page.page.fill("#key input", key)
        page.page.click("#key button")
    page.done()
    page.page.wait_for_selector("#picture svg")
    assert "sesame" not in page.page.evaluate("JSON.stringify(localStorage)")
    page.page.reload()
    page.press("Regenerate")
    page.done()
    assert page.page.locator("#key").count() == 0


def test_hostile_text_is_inert(served: Running, tab: Callable[..., Tab]) -> None:
    page = tab(served).open()
    page.canned([HOSTILE[i : i + 3] for i in range(0, len(HOSTILE), 3)])
    page.ask(HOSTILE)
    page.page.wait_for_selector(".code-str", state="attached")
    assert page.page.evaluate(INERT) == [0, 0, ["https:", "http:"]]
    for text in ('<img src=x onerror="alert(1)">', "</script>", "alert(8)", "alert(11)"):
        assert text in page.text()
    page.page.click("article.assistant a:not([href])")
    assert len(page.page.context.pages) == 1
    page.check()


def test_any_text_is_shown_and_inert(served: Running, tab: Callable[..., Tab]) -> None:
    """Random Markdown, in random pieces: no error, nothing live, no word lost."""
    page, draw = tab(served).open(), random.Random(1)
    for _ in range(40):
        words = [f"word{i}" for i in range(12)]
        text = "".join(
            f"{''.join(draw.choices(MARKS, k=draw.randint(1, 9)))}{word}" for word in words
        )
        cuts = sorted(draw.sample(range(len(text)), 8))
        page.canned([text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)])
        page.page.click("#new")
        page.ask("Go")
        bad, handlers, links = page.page.evaluate(INERT)
        assert (bad, handlers) == (0, 0), text
        assert set(links) <= {"http:", "https:"}, text
    page.check()


def test_a_long_answer_costs_little(served: Running, tab: Callable[..., Tab]) -> None:
    """The last 500 of 10,000 tokens, as fast as a fast model gives them: milliseconds of the main thread."""
    page = tab(served, reduced_motion="reduce").open()
    page.page.click("#show-memory")
    sentence = "Some **words** of `code` and a list:\n\n- one\n- two\n\n```python\nx = 1\n```\n\n"
    tokens = [sentence[i : i + 4] for i in range(0, len(sentence), 4)] * 480
    page.canned(tokens[:9500])
    page.ask("Go")
    page.canned(tokens[9500:10000], pause_ms=10)
    session = page.page.context.new_cdp_session(page.page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})  # others are busy, too

    def busy_s() -> float:
        found = {m["name"]: m["value"] for m in session.send("Performance.getMetrics")["metrics"]}
        return float(found["TaskDuration"])

    before = busy_s()
    page.press("Continue")
    page.page.wait_for_timeout(7000)  # a wait for something would itself keep the page busy
    page.done()
    each_ms = (busy_s() - before) / 500 * 1000
    print(f"{each_ms:.2f} ms a token")
    assert each_ms < 2
    page.check()


def test_phones(served: Running, tab: Callable[..., Tab]) -> None:
    page = tab(
        served, viewport={"width": 320, "height": 640}, has_touch=True, is_mobile=True
    ).open()
    page.canned(
        [
            "a" * 300,
            "\n\n| " + "wide | " * 30 + "\n|" + "---|" * 30 + "\n```\n" + "long " * 50 + "\n```\n",
        ]
    )
    page.page.fill("#box", "one")
    page.page.press("#box", "Enter")
    page.page.type("#box", "two")
    assert page.page.input_value("#box") == "one\ntwo"
    page.page.click("#send")
    page.done()
    for what in (None, "#show-memory", "#show-memory", "#show-chats"):
        if what:
            page.page.click(what)
        assert page.page.evaluate("document.documentElement.scrollWidth") == 320, what
        assert page.page.evaluate("document.getElementById('log').scrollWidth") <= 320, what
    page.check()


@pytest.mark.parametrize("width", [320, 768, 1400])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nobody_is_left_out(
    served: Running, tab: Callable[..., Tab], width: int, theme: str
) -> None:
    """axe-core finds nothing serious, in any state of the page."""
    script = browser.axe()
    page = tab(served, viewport={"width": width, "height": 800}, color_scheme=theme).open()

    def serious() -> list[str]:
        found = page.page.evaluate("axe.run()")["violations"]
        return [
            f"{v['id']}: {v['nodes'][0]['html'][:200]}"
            for v in found
            if v["impact"] in ("serious", "critical")
        ]

    page.page.evaluate(script)
    assert serious() == [], "empty"
    page.canned(
        [
            HOSTILE,
            "\n- [x] done\n\n```python\nx = 'y'  # z\n```\n> quote\n",
            {"reasoning_content": "hm"},
        ],
        finish="length",
    )
    page.ask("Go")
    page.page.click(".account summary")
    page.page.click(".thinking summary")
    assert serious() == [], "a conversation"
    if page.page.locator("#memory").is_hidden():
        page.page.click("#show-memory")
    page.page.wait_for_selector("#picture svg")
    page.page.click("#twin summary")
    assert serious() == [], "the picture"
    page.page.click("#show-settings")
    assert serious() == [], "settings"
    page.check()


def test_the_picture_follows_an_answer(
    serve: Serving, open_paged: Callable[..., Model], tab: Callable[..., Tab]
) -> None:
    running = serve(lambda: open_paged("qwen3_moe")).until_ready()
    page = tab(running, viewport={"width": 1400, "height": 900}).open()
    page.sampling(max_tokens=40, ignore_eos=True)
    page.page.wait_for_selector("#picture canvas")
    page.ask("a b c")
    page.page.locator("#picture [aria-label^=Model] rect.held").last.dispatch_event(
        "pointermove", {"bubbles": True}
    )
    assert re.match(r"(layer 1, experts|head): [\d.]+ MB, ", page.text("#says"))
    page.page.click("#twin summary")
    rows = page.page.locator("#twin tbody tr")
    parts = page.page.evaluate(
        "fetch('v1/placement').then((r) => r.json()).then((p) => p.parts.length)"
    )
    assert rows.count() == parts
    with page.page.expect_event("requestfailed", is_live):  # given up
        page.page.evaluate(HIDE)
    page.page.evaluate(HIDE.replace("true", "false", 1))
    page.page.wait_for_selector("#picture canvas")
    with page.page.expect_event("requestfailed", is_live):
        page.page.click("#show-memory")
    page.check()


def is_live(request: Any) -> bool:
    return str(request.url).endswith("/v1/live")


def test_stillness_is_respected(
    serve: Serving, open_paged: Callable[..., Model], tab: Callable[..., Tab]
) -> None:
    running = serve(lambda: open_paged("llama")).until_ready()
    for motion, moves in (("reduce", False), ("no-preference", True)):
        page = tab(running, viewport={"width": 1400, "height": 900}, reduced_motion=motion).open()
        page.sampling(max_tokens=100, ignore_eos=True)
        page.page.wait_for_selector("#picture .flash", state="attached")
        page.page.evaluate(MOVES)
        page.ask("a b c")
        page.page.wait_for_timeout(1200)
        assert (page.page.evaluate("window.most") > 0) == moves, motion
        page.check()
