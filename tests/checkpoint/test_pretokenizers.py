"""Each named pre-tokenizer cuts a text where the models of that name do."""

from __future__ import annotations

from itertools import pairwise

import pytest

from outsize.checkpoint import pretokenizers
from outsize.errors import UnsupportedError
from tests.checkpoint.test_tokenizer import HARD

PROBE = "I'LL say myHTTP x=12345;\n\n  don't (日本語、 a\u0301b"
# Every one was compared with llama.cpp on a longer text, by the ids of merges that cross all borders.
# It differs where it has no classes of cased letters (combining marks in gpt-4o, tekken and kimi-k2,
# capitals in youtu) and in deepseek's digits and wide spaces; there the models' own files count.
CUT = """\
a.x-4.0 exaone4 gigachat gpt-2 gpt2 granite-docling jais mellum olmo trillion
I|'|LL| say| myHTTP| x|=|12345|;|↵↵ | don|'t| (|日本語|、| a|+|b
bailingmoe bailingmoe2 deepseek-r1-qwen grok-2 hunyuan kormo llada-moe megrez qwen2 solar-open stablelm2
I|'LL| say| myHTTP| x|=|1|2|3|4|5|;↵↵| | don|'t| (|日本語|、| a|+b
command-r exaone minerva-7b refact smollm starcoder
I|'|LL| say| myHTTP| x|=|1|2|3|4|5|;|↵↵ | don|'t| (|日本語|、| a|+|b
chatglm-bpe dbrx falcon3 glm4 jais-2 lfm2 llama-bpe llama-v3 llama3 midm-2.0 minicpm5 pixtral smaug-bpe
I|'LL| say| myHTTP| x|=|123|45|;↵↵| | don|'t| (|日本語|、| a|+b
deepseek-coder deepseek-llm
I|'|LL| say| myHTTP| x|=|1|2|3|4|5|;|↵|↵| | don|'|t| (|日本語|、| a|+|b
deepseek-v3 hunyuan-dense
I|'LL| say| myHTTP| x|=|123|45|;↵↵| | don|'t| (|日本語|、| a+b
default falcon
I|'|LL| say| myHTTP| x|=|123|45|;|↵↵ | don|'|t| |(|日本語|、| a|+|b
gpt-4o kanana2 kimi-k2 llama4 minimax-m2
I'LL| say| my|HTTP| x|=|123|45|;↵↵| | don't| (|日本語|、| a+b
qwen35
I|'LL| say| myHTTP| x|=|1|2|3|4|5|;↵↵| | don|'t| (|日本語|、| a+b
seed-coder
I|'LL| say| myHTTP| x|=|1|2|3|4|5|;|↵↵| | don|'t| (|日本語|、| a|+b
superbpe
I'LL say myHTTP x=|12|345|;↵↵  don't (日本語、 a+b
tekken
I|'LL| say| my|HTTP| x|=|1|2|3|4|5|;↵↵| | don|'t| (|日本語|、| a+b
viking
I'LL| say| myHTTP| x=|1|2|3|4|5|;|↵↵ | don't| (|日本語|、| a+b
youtu
I'LL| say| my|HTTP| x|=|1|2|3|4|5|;↵↵| | don't| (|日本語|、| a+b
"""  # names, then the words between bars, where ↵ is a line feed and + the combining accent
HARDER = HARD + (
    "HTTPServer ÀÉÎ straße Ωμέγα ЖЖжж 12 1234 12345678 1,234.56 a1b2 'S 'll  !!\n\n //\n <=>+^~|`$ "
    "[b]{c} _x_ __init__ 가나다 ㄱㄴ ㄅㄆ ひらカタ漢字 "
    "、。「」… —‘x’ हिन्दी বাংলা ไทย ¹²³ ½ Ⅷ ٣٤ ǅ ʰ ª a̐b\r\n\r\n\t \n x \n\n"
)


def cut(name: str, text: str) -> list[str]:
    pieces = pretokenizers.find(name).build().pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in pieces]


def test_every_name_cuts_as_its_models_do() -> None:
    lines = CUT.splitlines()
    expected = {
        n: words
        for names, words in zip(lines[::2], lines[1::2], strict=True)
        for n in names.split()
    }
    found = {name: "|".join(cut(name, PROBE)) for name in pretokenizers.KNOWN}
    assert {n: w.replace("\n", "↵").replace("\u0301", "+") for n, w in found.items()} == expected


@pytest.mark.parametrize("name", [n for n, p in pretokenizers.KNOWN.items() if not p.in_bytes])
def test_the_expressions_mean_what_they_mean_elsewhere(name: str) -> None:
    """Oniguruma, which the tokenizers library uses, against the module that tiktoken's users know."""
    regex = pytest.importorskip("regex")
    words = [HARDER]
    for pattern in pretokenizers.KNOWN[name].patterns:
        split = []
        for word in words:
            edges = [0, len(word)]
            for match in regex.finditer(pattern, word, flags=regex.V1):
                edges += match.span()
            edges.sort()
            split += [word[a:b] for a, b in pairwise(edges) if a < b]
        words = split
    assert cut(name, HARDER) == words


def test_what_else_a_name_says() -> None:
    names = pretokenizers.KNOWN
    first = {name for name in names if pretokenizers.default_add_bos(name)}
    llama3 = {"falcon3", "lfm2", "llama-bpe", "llama-v3", "llama3", "midm-2.0", "pixtral"}
    assert first == llama3 | {"tekken"}
    assert {n for n in names if names[n].ignore_merges} == first | {"minicpm5", "youtu"}
    composed = {"command-r", "deepseek-r1-qwen", "olmo", "qwen2", "qwen35", "stablelm2"}
    assert {n for n in names if names[n].nfc} == composed
    assert not pretokenizers.default_add_bos("unheard-of")


@pytest.mark.parametrize("name", ["afmoe", "falcon-h1", 5, None])
def test_an_unknown_name_is_refused(name: object) -> None:
    with pytest.raises(UnsupportedError, match=r"is not known; known are a\.x-4\.0, .*, youtu"):
        pretokenizers.find(name)
