"""Lazy prefill held to the claims of its paper (LazyLLM, arXiv 2407.14057), and other ways to compute less of
a prompt: `python -m experiments.quality.lazy PART MODEL --questions FILE --text FILE -o FILE`, where PART is

qa      questions over several documents: is an answer in the reply, and how likely is the answer
text    on passages of a text: which share of the tokens holds how much attention, by layer; and one prune
        point at several depths, held to the full pass
decode  what a reply of 68 tokens computes of its prompt in the end, and how long its steps take

A row a prompt and way; `lazy_summary` makes tables of them. Seconds are of one thread's processor time.
"""

from __future__ import annotations

import copy
import gzip
import json
import random
import re
import string
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice, product
from pathlib import Path
from typing import Any, TypeVar

import outsize
from experiments.quality.lazy_ways import WAYS, Seen, all_ways, first, likelihoods, passed, replies
from experiments.runs import Row, arguments, record
from outsize.engine.model import Model
from outsize.options import Options
from outsize.text.template import Messages

REPLY, LONG_REPLY = 16, 68  # tokens; the second is the paper's mean
TOP = (0.1, 0.3, 0.5)  # shares of tokens


def questions(path: Path, number: int) -> Iterator[tuple[Row, str, list[Messages]]]:
    """A question, where among documents the one with its answer is, and chats that ask it after the documents
    and before. Other documents are other questions' and hold no answer."""
    with gzip.open(path, "rt", encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    for i, row in enumerate(rows):
        draw, place = random.Random(i), ("first", "middle", "last")[i % 3]
        documents = list[Row]()
        while len(documents) < number - 1:
            other = draw.choice(rows)["ctxs"][0]
            if not has(other["text"], row["answers"]) and other not in documents:
                documents.append(other)
        at = {"first": 0, "middle": number // 2, "last": number - 1}[place]
        documents.insert(at, row["ctxs"][0])
        text = "\n\n".join(f"{d['title']}: {d['text']}" for d in documents)
        ask = f"Answer with a few words from the documents. Question: {row['question']}?"
        told = f"{text}\n\n{ask}", f"{ask}\n\n{text}"
        yield row, place, [[{"role": "user", "content": some}] for some in told]


def has(text: str, answers: Sequence[str]) -> bool:
    """Is one of the answers in a text, but for case, marks and articles?"""
    return any(f" {plain(a)} " in f" {plain(text)} " for a in answers)


def plain(text: str) -> str:
    bare = "".join(" " if c in string.punctuation else c for c in text.lower())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def asked(model: Model, a: Any) -> Iterator[Row]:
    t = model.transformer
    for number, (row, place, chats) in numbered(questions(a.questions, a.documents), a):
        answer = model.tokens.encode(row["answers"][0])[:16]
        prompts = model.encode_fitting(chats, Options())
        names_first = [] if number % a.seldom else a.ways_first
        for asks, names, ids in zip(("last", "first"), (a.ways, names_first), prompts, strict=True):
            if not names:
                continue
            begun = all_ways(t, ids, names)
            again = [replace(b, kv=copy.deepcopy(b.kv)) for b in begun.values()]
            nats = likelihoods(t, again, answer)
            said = [model.tokens.decode(x) for x in replies(t, list(begun.values()), REPLY)]
            for (name, b), text, sure in zip(begun.items(), said, nats, strict=True):
                yield {
                    "question": number, "asks": asks, "gold": place, "tokens": b.length, "way": name,
                    "share": b.share, "cpu_s": b.cpu_s, "right": has(text.split("\n\n")[0], row["answers"]),
                    "nats": sure, "answer_tokens": len(answer), "reply": text,
                }  # fmt: skip


T = TypeVar("T")


def numbered(found: Iterator[T], a: Any) -> Iterator[tuple[int, T]]:
    """Those from `a.skip` to `a.count` - 1."""
    return islice(enumerate(found), a.skip, a.count)


def passages(model: Model, a: Any) -> Iterator[list[int]]:
    """Evenly through the text."""
    text = a.text.read_text(encoding="utf-8")
    for i in range(a.count):
        some = text[len(text) * i // a.count :][: 8 * a.tokens]
        yield model.tokens.encode(some, start=True)[: a.tokens]


def attention(seen: Seen) -> Row:
    """Of each layer: the share of the last token's attention that the most attended tokens hold, that the
    first 4 and last 64 do, that as many of the most attended do, and that the first token does."""
    n = len(seen.shares[0])
    best = [s.sort(descending=True).values.cumsum(0) for s in seen.shares]
    return {
        "held": [[float(b[round(share * n) - 1]) for share in TOP] for b in best],
        "ends": [float(s[:4].sum() + s[-64:].sum()) for s in seen.shares],
        "best_68": [float(b[67]) for b in best],
        "first_token": [float(s[0]) for s in seen.shares],
    }


def measured(model: Model, a: Any) -> Iterator[Row]:
    t = model.transformer
    layers = len(t.paged_layers) // 2
    for number, ids in numbered(passages(model, a), a):
        about = {"passage": number, "tokens": len(ids)}
        h_TD, seen = passed(t, t.new_kv(), ids, range(len(ids)), (layers, 1))
        if "last" in a.scores:
            yield about | attention(seen)
        exact = t.logits(h_TD[-1:])[0].log_softmax(-1)
        for after, keep, score in product(a.after, a.keep, a.scores):
            begun = first(t, ids, f"lazy:keep={keep},after={after},score={score}")
            lossy = begun.logits_V.log_softmax(-1)
            yield about | {
                "after": after, "keep": keep, "score": score, "share": begun.share,
                "first_kept": all(0 not in pruned.tokens for pruned in begun.kv.pruned),
                "top1": bool(exact.argmax() == lossy.argmax()),
                "kl": float((exact.exp() * (exact - lossy)).sum()),
            }  # fmt: skip


def decoded(model: Model, a: Any) -> Iterator[Row]:
    t = model.transformer
    for number, ids in numbered(passages(model, a), a):
        for name, begun in all_ways(t, ids, a.ways_decode).items():
            started = time.thread_time()
            replies(t, [begun], LONG_REPLY)
            yield {
                "passage": number, "tokens": len(ids), "way": name, "share": begun.share,
                "cpu_s": begun.cpu_s, "steps": LONG_REPLY - 1, "decode_cpu_s": time.thread_time() - started,
                "share_after": begun.kv.computed,
            }  # fmt: skip


def main() -> None:
    a = arguments(
        __doc__, "part", "model", questions=Path("questions.jsonl.gz"), text=Path("text.txt"), count=60,
        skip=0, documents=6, tokens=1024, ways=list(WAYS), ways_first=["full"], seldom=1,
        ways_decode=["full", "gentle", "fast"],
        after=[0.1, 0.3, 0.6, 0.9], keep=[0.1, 0.3], scores=["last"],
    )  # fmt: skip
    parts = {"qa": asked, "text": measured, "decode": decoded}
    with outsize.load(a.model, context=4096, threads=1, prefix_cache="off", quiet=True) as model:
        first(model.transformer, [1] * 300, "full")  # the first of all is slower
        for row in parts[a.part](model, a):
            record({"model": model.name, "part": a.part} | row, a.output)


if __name__ == "__main__":
    main()
