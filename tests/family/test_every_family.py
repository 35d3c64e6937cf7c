"""What holds for every family by its name: positions as transformers' own module turns them, texts cut as its
models cut them, the ids of a chat those of transformers. A family that is added must be named here.

The three general laws: every tensor used (tests/laws/test_tensors.py), every key heeded
(tests/laws/test_config_keys.py, tests/family/test_gguf_keys.py), prompt ids equal (here, and
tests/laws/test_tokenizer_ids.py). The first two take their families from `families()`.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers

from outsize.checkpoint import pretokenizers
from outsize.checkpoint import tokenizer as tokenizers
from outsize.checkpoint.checkpoint import TokenizerSpec
from outsize.checkpoint.opening import open_checkpoint
from outsize.engine.open_tokens import tokens as tokens_of
from outsize.errors import UnsupportedError
from outsize.family.find import families, recipe
from outsize.model.layers import cos_sin
from outsize.options import Options
from outsize.pack import fetch
from outsize.text.prompt import encode
from tests.checkpoint.test_pretokenizers import HARDER, cut
from tests.checkpoint.test_tokenizer import trained
from tests.golden import tiny
from tests.laws.test_config_keys import CLASSES

transformers = pytest.importorskip("transformers", minversion="5.20")

# What the families' published GGUF files say in `tokenizer.ggml.pre`; or the tokenizer's kind, where it has
# no such name. ("-": there are no GGUF files.)
SCORED, MERGED = "llama", "gemma4"
PRE: dict[str, tuple[str, ...]] = {
    "llama": ("llama-bpe", "smollm", SCORED), "mistral": (SCORED, "tekken"), "mixtral": (SCORED,),
    "qwen2": ("qwen2",), "qwen3": ("qwen2",), "qwen3_moe": ("qwen2",), "qwen2_moe": ("qwen2",),
    "gemma2": (SCORED,), "gemma3": (SCORED,), "gemma4": (MERGED,), "olmoe": ("olmo",), "olmo2": ("dbrx",),
    "olmo3": ("dbrx",), "gpt_oss": ("gpt-4o",), "phi3": (SCORED, "dbrx", "gpt-4o"), "granite": ("refact",),
    "granitemoe": ("refact",), "smollm3": ("smaug-bpe",), "ministral3": ("tekken",),
    "minimax_m2": ("minimax-m2",), "glm4_moe": ("glm4",), "glm4_moe_lite": ("glm4",),
    "deepseek_v3": ("deepseek-v3", "kimi-k2"), "llama4": ("llama4",), "lfm2": ("lfm2",),
    "qwen3_next": ("qwen2",), "qwen3_5": ("qwen35",), "qwen3_5_moe": ("qwen35",),
    "falcon": ("falcon",), "opt": ("-",), "afm": ("-",), "memoryllm": ("-",),
}  # fmt: skip
# transformers' classes that state how texts are cut, by themselves.
OF_CLASS = {
    "qwen2": "Qwen2Tokenizer", "qwen35": "Qwen3_5Tokenizer", "gpt-2": "GPT2Tokenizer",
}  # fmt: skip
# Inside the tiny configs' original contexts, at their ends, and beyond.
POSITIONS = [0, 1, 2, 7, 15, 16, 17, 31, 32, 63, 64, 65, 100, 255, 511, 512, 700, 4000]
Folders = Callable[[str], Path]


def test_every_family_is_named() -> None:
    assert set(PRE) == set(families())


@pytest.mark.parametrize("family", PRE)
def test_the_cuts_of_its_files_are_known(family: str) -> None:
    for name in PRE[family]:
        if name not in (SCORED, MERGED, "-", "falcon"):  # falcon's cuts may be within characters
            assert "".join(cut(name, HARDER)) == HARDER


@pytest.mark.parametrize("name", OF_CLASS)
def test_texts_are_cut_as_transformers_classes_cut_them(name: str) -> None:
    made = getattr(transformers, OF_CLASS[name])(vocab={}, merges=[])
    theirs = made.backend_tokenizer
    text = HARDER if theirs.normalizer is None else theirs.normalizer.normalize_str(HARDER)
    pieces = theirs.pre_tokenizer.pre_tokenize_str(text)
    edges = [start for _, (start, _) in pieces] + [len(text)]
    assert cut(name, text) == [text[a:b] for a, b in pairwise(edges)]
    ours = pretokenizers.KNOWN[name].normalizer
    assert text == (HARDER if ours is None else ours.normalize_str(HARDER))


NAMED = sorted({n for names in PRE.values() for n in names} - {SCORED, MERGED, "-"})


@pytest.mark.parametrize("name", NAMED)
def test_ids_of_a_gguf_are_those_of_a_tokenizer_json(name: str) -> None:
    """The same pieces and merges, cut by the expressions as a published tokenizer.json states them, by
    transformers."""
    pre = pretokenizers.find(name)
    pieces, merges = trained(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    arrays = {
        "model": "gpt2", "pre": name, "tokens": [*pieces, "<s>"], "merges": merges,
        "token_type": np.array([1] * len(pieces) + [3]),
    }  # fmt: skip
    ours = tokenizers.build(TokenizerSpec(arrays=arrays))
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.from_json(ours.to_str())
    )
    want = theirs(HARDER, add_special_tokens=False)["input_ids"]
    assert tokenizers.lean(ours.to_str()).encode(HARDER, add_special_tokens=False).ids == want
    assert theirs.decode(want, clean_up_tokenization_spaces=False) == (
        HARDER if pre.normalizer is None else pre.normalizer.normalize_str(HARDER)
    )


def test_falcons_ids_are_those_of_its_tokenizer_json() -> None:
    """The last two steps cut letters that stand for bytes: of \u043c, the bytes d0 and bc."""
    pieces, merges = trained(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    arrays = {"model": "gpt2", "pre": "falcon", "tokens": pieces, "merges": merges}
    ours = tokenizers.build(TokenizerSpec(arrays=arrays))
    stated = json.loads(ours.to_str()) | {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Punctuation", "behavior": "Contiguous"},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            {"type": "Digits", "individual_digits": False},
            {"type": "Split", "pattern": {"Regex": "[0-9]" * 3}, "behavior": "Isolated", "invert": False},
        ]}
    }  # fmt: skip
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.from_json(json.dumps(stated))
    )
    for text in (HARDER, "\u043c\u00bd 12345 a1b2", "", "...ok!! 'll"):
        want = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, add_special_tokens=False).ids == want


CHAT = [
    {"role": "system", "content": "Be  brief.\n"},
    {"role": "user", "content": "naïve café 日本語 🙂\t\r\n<s> </s>"},
    {"role": "assistant", "content": "ok"},
    {"role": "user", "content": " again "},
]


@pytest.mark.parametrize("family", families())
def test_a_chats_ids_are_those_of_transformers(family: str, folder_of: Folders) -> None:
    """Through the folder's template and tokenizer. (Names of control tokens in messages are text here.)"""
    folder = folder_of(family)
    pack = fetch.pack(str(folder), encoding="bf16", quiet=True)
    plain = [{k: v.replace("<s> </s>", "") for k, v in m.items()} for m in CHAT]
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        chat_template=(folder / "chat_template.jinja").read_text(),
    )
    want = theirs.apply_chat_template(plain, add_generation_prompt=True)["input_ids"]
    made = tokens_of(pack)
    assert encode(pack, made, [plain], Options())[0] == list(want)
    marked = encode(pack, made, [CHAT], Options())[0]
    assert marked.count(256) == list(want).count(256)  # of <s>, the template's alone


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mamba2", "'mamba2' is not known; known are .*, smollm3"),
        ("nemotron_h", "'nemotron_h' is not known: its layers have one half alone.*Mamba 2"),
        ("gemma3n_text", "'gemma3n' is not known: its four residual streams"),
    ],
)
def test_others_are_refused_by_name_and_by_the_file_that_says_so(
    name: str, words: str, folder_of: Folders
) -> None:
    checkpoint = open_checkpoint(folder_of("llama"))
    with pytest.raises(UnsupportedError, match=rf"^config\.json: the architecture {words}"):
        recipe(replace(checkpoint, architecture=name))
    of_gguf = replace(checkpoint, architecture=name, format="gguf", files=(Path("a.gguf"),))
    with pytest.raises(UnsupportedError, match=rf"^a\.gguf: the architecture {words}"):
        recipe(of_gguf)


def rotary(family: str) -> tuple[Any, Any]:
    """transformers' config of a family's tiny model, and its module of positions."""
    settings = tiny.config(family)
    settings.pop("model_type")
    config = getattr(transformers, CLASSES[family])(**settings)
    name = type(config).__module__.replace("configuration", "modeling")
    module = importlib.import_module(name)
    found = [
        value
        for key, value in vars(module).items()
        if key.endswith("RotaryEmbedding") and "Vision" not in key and "Audio" not in key
    ]
    return config, found[0](config)


ROTATING = sorted(set(families()) - {"afm", "memoryllm", "opt"})


@pytest.mark.parametrize("family", ROTATING)
@pytest.mark.filterwarnings("ignore")
def test_each_layer_turns_as_transformers_modules_turn(family: str, folder_of: Folders) -> None:
    """The tiny config's: every kind of scaling that a family's golden vectors have, at positions inside and
    beyond the original context. AFM's and MemoryLLM's are llama's; OPT learns its positions."""
    d = recipe(open_checkpoint(folder_of(family))).description
    config, module = rotary(family)
    takes_kind = "layer_type" in inspect.signature(module.forward).parameters
    for last in (15, POSITIONS[-1]):  # LongRoPE goes by the longest position of a text
        ids = [p for p in POSITIONS if p <= last]
        for i, layer in enumerate(d.for_context(last + 1).layers):
            rope, form = layer.rope, d.of_layer(i)
            if layer.mixer != "attention" or rope.rotated == 0:
                continue
            kind = (config.layer_types[i],) if takes_kind else ()
            made = module(torch.zeros(1), torch.tensor([ids]), *kind)
            if isinstance(made, torch.Tensor):  # complex (Llama 4)
                expected = made.view(len(ids), -1)
            else:
                cos, sin = made
                pairs = cos.shape[-1] // 2
                pairs = cos.shape[-1] if family == "gpt_oss" else pairs
                expected = torch.complex(cos[..., :pairs], sin[..., :pairs]).view(-1, pairs)
            angles = cos_sin(replace(rope, query_growth=0.0), form.head_dim, torch.tensor(ids))[
                :, 0
            ]
            count = expected.shape[1]
            torch.testing.assert_close(angles[:, :count], expected, atol=2e-3, rtol=0)
            assert (angles[:, count:] == 1).all()
