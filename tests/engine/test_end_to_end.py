"""Chats through models whose tokenizer is not the default one: prompt ids equal `transformers`'
apply_chat_template, greedy answers its fp32 ones.

The rule for answers of up to 32 tokens: each is the reference's likeliest after what was answered before it,
or, at a near tie, behind it by no more logit than a stated gap: another order of sums may choose the other.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import outsize
from outsize.engine.model import Model
from outsize.options import Options
from tests.golden.test_golden import GGUF_NAMES
from tests.scripted import byte_tokenizer

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")
MODELS = os.environ.get("OUTSIZE_MODELS")  # the fixture of the home takes such names away
NEW = 32
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 1024,
}  # fmt: skip
CHATS: list[list[Mapping[str, str]]] = [
    [{"role": "user", "content": "Why is the sky blue?"}],
    [
        {"role": "system", "content": "Be  brief.\n\n"},
        {"role": "user", "content": "1 + 1 = ?\t(é, 日本語, 🙂)"},
        {"role": "assistant", "content": "2\n"},
        {"role": "user", "content": "'Sure'?   I'll check 12345."},
    ],
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def random_model(config: Any) -> Any:
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.copy_(1 + 0.1 * torch.randn_like(p) if "norm" in name else 0.2 * torch.randn_like(p))
    return made


def write_gguf(path: Path, model: Any, arch: str, arrays: Mapping[str, Any]) -> Path:
    """`arrays`: tokenizer metadata without its prefix."""
    c, w = model.config, gguf.GGUFWriter(path, arch)
    w.add_block_count(c.num_hidden_layers)
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_rope_freq_base(10_000.0)
    for key, value in arrays.items():
        add = {bool: w.add_bool, int: w.add_uint32, str: w.add_string}.get(type(value), w.add_array)
        add(f"tokenizer.{'' if key == 'chat_template' else 'ggml.'}{key}", value)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        for theirs, ours in GGUF_NAMES.items():
            name = name.replace(theirs, ours)
        w.add_tensor(name, value.numpy())
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def qwen(folder: Path) -> tuple[Path, Any, Any]:
    """Of full size: 151,643 pieces, control tokens after them, rows up to 151,936."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    twos = [(a, b) for a in letters for b in letters]
    merges = [*twos, *((a + b, c) for a, b in twos[:400] for c in letters)][: 151_643 - 256]
    pieces = [*letters, *(a + b for a, b in merges)]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    plain = ["<tool_call>", "</tool_call>"]
    fill = [f"[PAD{i}]" for i in range(len(pieces) + 5, 151_936)]
    made = transformers.Qwen2Tokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=merges)
    made.add_special_tokens({"additional_special_tokens": special[1:]})
    made.add_tokens(plain)
    made.chat_template = CHATML
    config = transformers.Qwen2Config(vocab_size=151_936, tie_word_embeddings=True, **SIZES)
    model = random_model(config)
    arrays = {
        "model": "gpt2", "pre": "qwen2", "tokens": [*pieces, *special, *plain, *fill],
        "token_type": [1] * len(pieces) + [3] * 3 + [4] * 2 + [5] * len(fill),
        "merges": [f"{a} {b}" for a, b in merges], "eos_token_id": len(pieces) + 2,
        "chat_template": CHATML,
    }  # fmt: skip
    return write_gguf(folder / "qwen.gguf", model, "qwen2", arrays), model, made


def llama3(folder: Path) -> tuple[Path, Any, Any]:
    """A folder as the hub has them: control tokens after the vocabulary, the start by the post-processor."""
    special = [
        f"<|{n}|>"
        for n in ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id")
    ]
    tokenizer = byte_tokenizer(special)
    pair = [(special[0], tokenizer.token_to_id(special[0]))]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{special[0]} $A", special_tokens=pair
    )
    config = transformers.LlamaConfig(vocab_size=261, bos_token_id=256, eos_token_id=257, **SIZES)
    model = random_model(config)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": special[0], "eos_token": special[4], "chat_template": LLAMA3}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder, model, transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def gemma(folder: Path) -> tuple[Path, Any, Any]:
    """SentencePiece-style with bytes, and user-defined pieces found inside text."""
    words = [
        "the",
        "he",
        "th",
        "sk",
        "sky",
        "▁sky",
        "▁s",
        "▁th",
        "▁the",
        "us",
        "er",
        "user",
        "▁b",
        "▁bl",
        "ue",
        "lue",
    ]
    singles = sorted({*"▁", *(chr(c) for c in range(33, 127))} | set("".join(words)))
    special, plain = (
        ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
        ["\n", "\n\n", "  ", "   "],
    )
    raw = [f"<0x{b:02X}>" for b in range(256)]
    tokens = [*special[:3], "<unk>", *special[3:], *plain, *raw, *words, *singles]
    types = [3] * 3 + [2] + [3] * 2 + [4] * 4 + [6] * 256 + [1] * (len(words) + len(singles))
    scores = [0.0] * (len(tokens) - len(singles) - len(words))
    scores += [-float(i + 1) for i in range(len(words))] + [-100.0] * len(singles)
    ids = {t: i for i, t in enumerate(tokens)}
    merges = [
        (w[:k], w[k:]) for w in words for k in range(1, len(w)) if {w[:k], w[k:]} <= ids.keys()
    ]
    model = models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", chat_template=GEMMA
    )
    config = transformers.Qwen2Config(vocab_size=len(tokens), tie_word_embeddings=True, **SIZES)
    made = random_model(config)
    arrays = {
        "model": "llama", "tokens": tokens, "token_type": types, "scores": scores, "bos_token_id": 2,
        "eos_token_id": 1, "unknown_token_id": 3, "add_bos_token": True, "add_space_prefix": False,
        "chat_template": GEMMA,
    }  # fmt: skip
    return write_gguf(folder / "gemma.gguf", made, "qwen2", arrays), made, theirs


def agreed(model: Any, prompt: Sequence[int], answer: Sequence[int], gap: float) -> int:
    """How many tokens of an answer are the reference's; fails at another one that is not near the best."""
    with torch.inference_mode():
        logits_TV = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    token_T = torch.tensor(list(answer))
    behind_T = logits_TV.max(1).values - logits_TV.gather(1, token_T[:, None])[:, 0]
    assert float(behind_T.max()) <= gap, f"token {int(behind_T.argmax())} of the answer"
    return int((behind_T == 0).sum())


def check(ours: Model, theirs: Any, tokenizer: Any, gap: float, share: float) -> None:
    """Ids of all chats, and the answers to them."""
    same = total = 0
    for chat in CHATS:
        ids = tokenizer.apply_chat_template(list(chat), add_generation_prompt=True)
        wanted = list(ids["input_ids"] if isinstance(ids, Mapping) else ids)
        assert ours.encode([chat], Options())[0] == wanted
        run = ours.stream(chat, max_tokens=NEW)
        list(run)
        total += len(run.request.seq.new_tokens)
        same += agreed(theirs, wanted, run.request.seq.new_tokens, gap)
    assert same >= share * total > 20


@pytest.mark.parametrize("shape", [qwen, llama3, gemma], ids=lambda f: f.__name__)
def test_chats(shape: Any, tmp_path: Path, home: Path) -> None:
    path, model, tokenizer = shape(tmp_path)
    with outsize.load(str(path), encoding="fp32", quiet=True) as ours:
        check(ours, model, tokenizer, gap=1e-3, share=1.0)


@pytest.mark.slow
@pytest.mark.parametrize(("encoding", "gap", "share"), [("fp32", 0.01, 1.0), ("auto", 0.5, 0.95)])
def test_chats_of_real_models(encoding: str, gap: float, share: float, home: Path) -> None:
    """Every GGUF of a folder that has a chat template, read by transformers itself as the reference."""
    if not MODELS:
        pytest.skip("OUTSIZE_MODELS names no folder of GGUF files")
    pytest.importorskip("accelerate")  # transformers reads GGUFs with it
    seen = []
    for path in sorted(Path(MODELS).glob("*.gguf")):
        with outsize.load(str(path), encoding=encoding, quiet=True) as ours:
            if not ours.pack.chat_templates:
                continue
            how = {"gguf_file": path.name}
            model = transformers.AutoModelForCausalLM.from_pretrained(
                path.parent, dtype=torch.float32, **how
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **how)
            check(ours, model, tokenizer, gap, share)
            seen.append(path.name)
    assert seen
