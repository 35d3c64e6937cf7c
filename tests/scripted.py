"""Models that say what they are told: each token is followed by one that is settled."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers


def byte_tokenizer(special: Sequence[str], plain: Sequence[str] = ()) -> Tokenizer:
    """256 bytes, then control tokens, then plain added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(special))
    made.add_tokens([AddedToken(p, normalized=False) for p in plain])
    return made


def write(
    folder: Path,
    tokenizer: Tokenizer,
    chain: Sequence[str],
    template: str,
    rows: int = 0,
    **generation: object,
) -> Path:
    """A llama without attention or feed-forward whose tokens follow each other as in `chain`, in which none
    comes twice; what is not in it is followed by its first. `rows` of the embedding: as many as tokens."""
    ids = [tokenizer.token_to_id(name) for name in chain]
    assert None not in ids
    assert len(set(ids)) == len(ids)
    vocab = rows or tokenizer.get_vocab_size()
    width = -(-vocab // 64) * 64
    follows = dict.fromkeys(range(vocab), ids[0]) | dict(pairwise(ids))
    head, embed = np.zeros((vocab, width), np.float32), np.eye(vocab, width, dtype=np.float32)
    for token, after in follows.items():
        head[after, token] = 1.0
    p, shapes = (
        "model.layers.0.",
        {"q_proj": (64, width), "k_proj": (64, width), "v_proj": (64, width)},
    )
    weights = {f"{p}self_attn.{n}.weight": np.zeros(s, np.float32) for n, s in shapes.items()}
    weights |= {
        f"{p}self_attn.o_proj.weight": np.zeros((width, 64), np.float32),
        f"{p}mlp.gate_proj.weight": np.zeros((64, width), np.float32),
        f"{p}mlp.up_proj.weight": np.zeros((64, width), np.float32),
        f"{p}mlp.down_proj.weight": np.zeros((width, 64), np.float32),
        "model.embed_tokens.weight": embed, "lm_head.weight": head,
    }  # fmt: skip
    norms = (p + "input_layernorm", p + "post_attention_layernorm", "model.norm")
    weights |= {f"{n}.weight": np.ones(width, np.float32) for n in norms}
    config = {
        "model_type": "llama", "vocab_size": vocab, "hidden_size": width, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, value in (("config", config), ("generation_config", generation)):
        (folder / f"{name}.json").write_text(json.dumps(value))
    (folder / "chat_template.jinja").write_text(template)
    return folder
