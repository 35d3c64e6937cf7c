"""Checked by mypy, never run: the public surface as a user would type it."""

from __future__ import annotations

import outsize


def use() -> None:
    with outsize.load("model.gguf", memory="4GB", context=2048, threads=2) as m:
        plan: outsize.Placement = m.placement
        print(plan.planned, plan.least, plan.streamed)
        for piece in m.stream("Why?", max_tokens=10, stop=["\n"]):
            text: str = piece
        replies: list[outsize.Reply] = m.generate(["a", "b"], temperature=0.5, seed=1)
        reply: outsize.Reply = m.chat([{"role": "user", "content": "hi"}], system="x")
        score: outsize.Score = m.score("text")
        print(text, replies[0].text, reply.tokens_per_s, score.logprobs[0])
        m.generate("a", temprature=1)  # type: ignore[call-arg]
