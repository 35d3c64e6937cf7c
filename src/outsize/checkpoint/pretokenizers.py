"""How a byte-level BPE tokenizer cuts text into words before it merges: what `tokenizer.ggml.pre` names.

A GGUF states a name only. The regular expressions are those of the named models' own tokenizer.json,
or, where that is not published, of llama.cpp's table; applied one after the other, each to what the
one before cut, matches and gaps alike being words. `nfc` is the model's own normalizer, which
llama.cpp leaves out: precomposed and decomposed accents are one text to these models.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tokenizers import Regex, normalizers, pre_tokenizers

from outsize.errors import UnsupportedError


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """`ignore_merges`: a word that is a piece is taken whole. `add_bos`: the start token is put before
    a prompt unless the file says otherwise. `in_bytes`: Falcon's steps, of which the last ones cut the
    letters that stand for bytes (six of which are numbers), as no expression for texts does."""

    patterns: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False
    in_bytes: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        if self.in_bytes:
            return _falcon()
        splits = [pre_tokenizers.Split(Regex(p), behavior="isolated") for p in self.patterns]
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([*splits, to_bytes])

    @property
    def normalizer(self) -> normalizers.Normalizer | None:
        return normalizers.NFC() if self.nfc else None


def _falcon() -> pre_tokenizers.PreTokenizer:
    """As tokenizer.json of tiiuae/falcon-7b states it."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation(behavior="contiguous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), behavior="isolated"),
        ]
    )


_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_CJK_OLD = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"


def _words(digits: str) -> str:
    """The expression of cl100k and those that vary it: by how many digits go together."""
    return "|".join((_SUFFIX, _WORD, digits, _SIGNS, _SPACE))


def _cased(suffix: str, digits: str, but: str = "", newlines: str = r"[\r\n/]*") -> str:
    """The expression of o200k and those that vary it: words break where capitals begin. `but`: letters
    left out."""
    upper, lower = (
        rf"[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}{but}]",
        rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}{but}]",
    )
    before = r"[^\r\n\p{L}\p{N}]?"
    words = f"{before}{upper}*{lower}+{suffix}|{before}{upper}+{lower}*{suffix}"
    return f"{words}|{digits}| ?[^\\s\\p{{L}}\\p{{N}}]+{newlines}|{_SPACE}"


# The cased letters of Unicode 14 as DeepSeek's first tokenizers list them.
_CASED_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481"
    "\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b"
    "\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b"
    "\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)

_gpt2 = PreTokenizer((_GPT2,))
_digit_gpt2 = PreTokenizer((r"\p{N}", _GPT2))
_cl100k = PreTokenizer((_words(r"\p{N}{1,3}"),))
_llama3 = replace(_cl100k, ignore_merges=True, add_bos=True)
_qwen2 = PreTokenizer((_words(r"\p{N}"),))
_gpt4o = PreTokenizer((_cased(_SUFFIX + "?", r"\p{N}{1,3}"),))
_bailing = PreTokenizer(
    (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]"
        r"|\s+(?!\S)|\s+",
    )
)
_deepseek3 = PreTokenizer(
    (
        r"\p{N}{1,3}",
        _CJK,
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
        r"| ?[\p{P}\p{S}]+[\r\n]*|" + _SPACE,
    )
)
_LONG_SPACE = "|".join(
    rf"\s{{{n}}}(?!\S)" for n in ("512", "256", "128", "64", "32", "16", "8", "4", "1,2")
)

KNOWN = {
    "a.x-4.0": _gpt2,
    "bailingmoe": _bailing,
    "bailingmoe2": _bailing,
    "chatglm-bpe": _cl100k,
    "command-r": replace(_digit_gpt2, nfc=True),
    "dbrx": _cl100k,
    "deepseek-coder": PreTokenizer(
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK_OLD, r"\p{N}"),
    ),
    "deepseek-llm": PreTokenizer(
        (
            r"[\r\n]",
            rf"\s?[{_CASED_LETTERS}]+",
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$",
            _CJK_OLD,
            r"\p{N}",
        )
    ),
    "deepseek-r1-qwen": replace(_qwen2, nfc=True),
    "deepseek-v3": _deepseek3,
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "exaone": _digit_gpt2,
    "exaone4": _gpt2,
    "falcon": PreTokenizer((), in_bytes=True),
    "falcon3": _llama3,
    "gigachat": _gpt2,
    "glm4": _cl100k,
    "gpt-2": _gpt2,
    "gpt-4o": _gpt4o,
    "gpt2": _gpt2,
    "granite-docling": _gpt2,
    "grok-2": _qwen2,
    "hunyuan": _qwen2,
    "hunyuan-dense": _deepseek3,
    "jais": _gpt2,
    "jais-2": PreTokenizer(
        ("|".join((_SUFFIX, _WORD, r"\p{N}{1,3}", _SIGNS, r"\s*[\r\n]+", _LONG_SPACE, r"\s")),)
    ),
    "kanana2": _gpt4o,
    "kimi-k2": PreTokenizer(
        (r"\p{Han}+|" + _cased(_SUFFIX + "?", r"\p{N}{1,3}", r"&&[^\p{Han}]", r"[\r\n]*"),)
    ),
    "kormo": _qwen2,
    "lfm2": _llama3,
    "llada-moe": _bailing,
    "llama-bpe": _llama3,
    "llama-v3": _llama3,
    "llama3": _llama3,
    "llama4": _gpt4o,
    "megrez": _qwen2,
    "mellum": _gpt2,
    "midm-2.0": _llama3,
    "minerva-7b": _digit_gpt2,
    "minicpm5": PreTokenizer((r"\p{N}{1,3}", _words(r"\p{N}+")), ignore_merges=True),
    "minimax-m2": _gpt4o,
    "olmo": replace(_gpt2, nfc=True),
    "pixtral": _llama3,
    "qwen2": replace(_qwen2, nfc=True),
    "qwen35": PreTokenizer(
        (
            _SUFFIX + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + _SPACE,
        ),
        nfc=True,
    ),
    "refact": _digit_gpt2,
    "seed-coder": PreTokenizer(
        ("|".join((_SUFFIX, _WORD, r"\p{N}", r" ?[^\s\p{L}\p{N}\r\n]+", _SPACE)),)
    ),
    "smaug-bpe": _cl100k,
    "smollm": _digit_gpt2,
    "solar-open": _qwen2,
    "stablelm2": replace(_qwen2, nfc=True),
    "starcoder": _digit_gpt2,
    "superbpe": PreTokenizer((r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    "tekken": PreTokenizer((_cased("", r"\p{N}"),), ignore_merges=True, add_bos=True),
    "trillion": _gpt2,
    "viking": PreTokenizer((" ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+", r"\p{N}")),
    "youtu": PreTokenizer(
        (
            "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c"
            "\u3001-\u303f\ufe30-\ufe4f]+|[\u3105-\u312f]+|" + _CJK,
            _cased(_SUFFIX + "?", r"\p{N}"),
        ),
        ignore_merges=True,
    ),
}  # fmt: skip


def find(name: object) -> PreTokenizer:
    """The pre-tokenizer of that name. Raises UnsupportedError."""
    if isinstance(name, str) and name in KNOWN:
        return KNOWN[name]
    raise UnsupportedError(
        f"pre-tokenizer {name!r} ('tokenizer.ggml.pre') is not known; known are {', '.join(KNOWN)}"
    )


def default_add_bos(name: str) -> bool:
    """Whether a start token is put before prompts where the file does not say."""
    return name in KNOWN and KNOWN[name].add_bos
