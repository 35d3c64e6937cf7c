"""Memory that a run needs beside the weights, in bytes: keys and values, scratch, adapters, tokenizer.

The costs are those of the worst span that the context allows, not of the idle state.
Shapes in names of sizes: T tokens of context, C tokens of a chunk, D width.
"""

from __future__ import annotations

from dataclasses import replace

from outsize.caching.eviction.echo import BYTES as ECHO_BYTES
from outsize.kernels.attention import CHUNK, score_bytes
from outsize.kernels.delta import BLOCK
from outsize.kernels.plain import WIDE_BYTES
from outsize.kv.int8 import entry_bytes
from outsize.kv.state import sizes_of
from outsize.pack.kinds.kind import kinds
from outsize.pack.outline import Outline
from outsize.pack.tables import TableHeader
from outsize.plan.placement import ADAPTER, TEMPLATE
from outsize.plan.warmup import COMPILED, COMPILED_BYTES
from outsize.prefix.disk import staging_bytes
from outsize.storage.buffers import huge_bytes
from outsize.weights.rows import IN_FLIGHT as ROWS_IN_FLIGHT

FRAGMENTS = 1.8  # what an allocator holds for a byte in use, among sizes as mixed as these
TEMPLATE_BYTES = 15_000_000  # of the process that renders chat templates
DRAFT, GRAMMARS, STATES = "draft model", "grammars", "sequence states"
# Of grammars: the library; a token of the vocabulary (290 while the tables are made, at 49 k and at 152 k
# tokens, 180 afterwards); a reply's grammar of 20 tools with 10 parameters each.
GRAMMAR_BASE, GRAMMAR_TOKEN, GRAMMAR_REPLY = 6_000_000, 290, 1_200_000
NEURON_BYTES = 600  # of what a policy, and the slot table, remember of a bundle of neurons
# Of a record of rows by token: its number and checksum in the header, and what came of asking for it; and of
# a slot for one, what the policy, the slot table and the cache remember (measured: 100 and 500).
ROW_BYTES, ROW_SLOT_BYTES = 160, 600
STREAM_TOKENS = 512  # of context that each further reply at once is planned for; beyond, some wait


def kv_bytes(o: Outline) -> int:
    """Of one token: its keys and values in all layers, its residual row, its rotary angles, its id; its
    embedding, or row of a table, where layers read that."""
    d = o.description
    kv = stored_bytes(o)
    if o.kv == "int8":  # of one layer, as numbers
        kv += sum(2 * j * e * o.activation_bytes for j, e in set(d.kv_sizes))
    angles = 4 * sum(d.rope_sizes.values())
    routed = 0 if d.mixture is None else d.width * (o.activation_bytes + 4) + 200 * d.mixture.used
    rows = 4 * d.width + sum(t.stride for t in _by_token(o)) if d.reads_tokens else 0
    read = d.width * o.activation_bytes * d.parallel  # by attention, until the feed-forward has
    return kv + 4 * d.width + angles + routed + rows + read + o.held + 100


def _by_token(o: Outline) -> list[TableHeader]:
    return [t for t in o.tables if t.kind == "tokens"]


def stored_bytes(o: Outline) -> int:
    """Of one token: its keys and values in all layers."""
    d = o.description
    each = d.kv_sizes
    sizes = [each[i] for i in d.kv_layers]
    if o.kv == "int8":
        return sum(2 * heads * entry_bytes(numbers) for heads, numbers in sizes)
    return sum(2 * heads * numbers * o.activation_bytes for heads, numbers in sizes)


def state_bytes(o: Outline) -> int:
    """Of all sequences together: the states of layers that keep those in place of keys and values."""
    found = (sizes_of(o.description, i) for i in range(o.description.num_layers))
    return o.streams * sum(s.nbytes(o.activation_bytes) for s in found if s is not None)


def staging(o: Outline, chunk: int | None) -> int:
    """Of blocks of keys and values on their way to and from a disk."""
    return staging_bytes(stored_bytes(o) * (chunk or CHUNK))


def kv_tokens(o: Outline, context: int) -> int:
    """Tokens of all sequences together that have room for keys and values: one of the whole context, and
    others beside it."""
    return context + (o.streams - 1) * min(context, STREAM_TOKENS)


def scratch_bytes(o: Outline, context: int) -> int:
    """The peak of computing one chunk of a prompt, beside weights."""
    return max(_layer_scratch(replace(o, description=d), context) for d in o.description.forms)


def _layer_scratch(o: Outline, context: int) -> int:
    """The same, of layers of one size."""
    d, a, c = o.description, o.activation_bytes, min(CHUNK, context)
    heads = (d.num_heads + d.num_kv_heads) * d.head_dim
    queries = d.num_heads * d.head_dim
    rows = d.width * a + d.qkv_rows * (a + 4 * d.qkv_bias) + 4 * heads * (1 + d.qk_norm)
    if d.latent is not None:
        # Queries before and after their map, latents, and what comes of values.
        rows += a * (2 * d.num_heads * (d.latent.key + d.latent.rope + d.latent.value) + queries)
    rows += (4 + a) * queries * d.gated
    attention = c * (rows + 3 * a * queries) + score_bytes(d, context, a)
    attention = max(attention, _delta_scratch(o, c), c * d.width * (4 * a + 24) * bool(d.kernel))
    inner = (
        d.ffn_width if d.mixture is None else max(d.ffn_width, d.mixture.width, d.mixture.shared)
    )
    inner = inner if d.shard is None else max(inner, d.shard.inner)
    ffn = c * (d.width * (2 * a + 4) + 3 * inner * a + 8 * inner * d.mlp_bias)
    ffn += 0 if d.mixture is None else 4 * c * (d.width + d.mixture.count)
    ffn += 0 if d.mixture is None or not d.mixture.shared else 8 * c * d.width
    if d.shard is not None:  # parts of two chunks on their way, the others', and their sum
        ffn += c * ((2 * d.shard.world + 2) * d.width + (d.shard.world + 1) * inner) * a
    block = min(WIDE_BYTES, 2 * inner * d.width * a)
    decoded = 2 * block + c * block // d.width  # once more as the matmul packs it; and its product
    ffn = max(ffn, c * d.token_width * (5 * a + 16))
    logits = 3 * 4 * d.vocab_size
    most = max(attention, c * rows + decoded, ffn + decoded, logits)
    return int(FRAGMENTS * most)


def _delta_scratch(o: Outline, chunk: int) -> int:
    """Of a chunk of tokens in a layer of the gated delta rule: inputs, as they are and joined to those
    before; sums, gates; and of one block, for each value head, queries, keys, values and what they make of
    each other."""
    x, a = o.description.delta, o.activation_bytes
    if x is None:
        return 0
    channels = 2 * x.keys + x.values
    row = (2 * channels + x.values + o.description.width) * a + 4 * (
        4 * x.values + 6 * x.value_heads
    )
    block = 4 * BLOCK * (4 * channels + x.value_heads * (6 * x.key + 6 * x.value + 5 * BLOCK))
    return chunk * row + block + 4 * x.value_heads * x.key * x.value


def token_bytes(o: Outline) -> int:
    """Of one token, in the model and in the one that drafts for it."""
    return kv_bytes(o) + (0 if o.smaller is None else kv_bytes(o.smaller))


def fixed_costs(o: Outline, runtime: int, tokenizer: int, context: int) -> dict[str, int]:
    """Everything beside weights, by its name in the plan. `runtime`: of the interpreter and libraries."""
    rows = [t for t in o.tables if t.kind == "rows"]
    return {
        "runtime": runtime,
        "tokenizer": tokenizer,
        "compiled products": COMPILED * COMPILED_BYTES,
        "keys and values": kv_tokens(o, context) * kv_bytes(o),
        **({STATES: state_bytes(o)} if o.description.has_states else {}),
        **{ADAPTER + name: size for name, size in o.adapters.items()},
        **(
            {}
            if o.smaller is None
            else {DRAFT: draft_bytes(replace(o.smaller, streams=o.streams), context)}
        ),
        **({"drafting": o.drafting} if o.drafting else {}),
        **({TEMPLATE: TEMPLATE_BYTES} if o.has_template else {}),
        **({GRAMMARS: grammar_bytes(o)} if o.grammars else {}),
        **({"cache policy": policy_bytes(o)} if routed(o) else {}),
        **({"copies of experts": o.copies} if o.copies else {}),
        **({} if o.neurons is None else {"neurons": o.neurons.memory}),
        **({} if o.nested is None else {"routers": o.nested.memory}),
        **({"prefix cache": o.staging} if o.staging else {}),
        "scratch": max(
            scratch_bytes(o, context),
            o.step_scratch,
            o.making,
            *(ROWS_IN_FLIGHT * t.stride for t in rows),
        ),
    }


def grammar_bytes(o: Outline) -> int:
    """What llguidance takes at most to have replies obey schemas and grammars."""
    tables = GRAMMAR_BASE + GRAMMAR_TOKEN * o.description.vocab_size
    return tables + GRAMMAR_REPLY * o.grammars


def policy_bytes(o: Outline) -> int:
    """What the eviction policy remembers of routing."""
    each = {"experts": ECHO_BYTES, "neurons": NEURON_BYTES, "tokens": ROW_BYTES}
    return sum(len(t.keys) * each[t.kind] for t in routed(o))


def routed(o: Outline) -> list[TableHeader]:
    """The tables whose records are routed."""
    return [t for t in o.tables if kinds()[t.kind].routed]


def all_bytes(o: Outline) -> int:
    """All weights that are worth memory, fully resident; experts' slots are in huge pages."""
    slots = [(t, most_slots(o, t)) for t in routed(o)]
    more = (huge_bytes(n * t.stride) - t.size + slot_bytes(t, n) for t, n in slots)
    return o.size + sum(more)


def most_slots(o: Outline, t: TableHeader) -> int:
    """Records of a table that are worth memory."""
    return kinds()[t.kind].most_slots(o.description, t)


def slot_bytes(t: TableHeader, count: int) -> int:
    """What so many slots of a table take beside the records in them, where there may be very many."""
    return count * ROW_SLOT_BYTES if t.kind == "tokens" else 0


def draft_bytes(smaller: Outline, context: int) -> int:
    """Of a smaller model that drafts: fully resident, with its own keys, values and scratch."""
    tokens = min(context, smaller.description.context)
    routing = policy_bytes(smaller) if routed(smaller) else 0
    kept = kv_tokens(smaller, tokens) * kv_bytes(smaller) + scratch_bytes(smaller, tokens)
    kept += state_bytes(smaller)
    return all_bytes(smaller) + routing + kept
