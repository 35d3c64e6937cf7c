"""YaRN (arXiv 2309.00071), and the numbers of tables of ropes."""

from __future__ import annotations

import math
from collections.abc import Mapping

from outsize.errors import CheckpointError
from outsize.model_config import Rope

Table = Mapping[str, object]
ORIGINAL = "original_max_position_embeddings"


def yarn(table: Table, base: float, head_dim: int) -> Rope:
    """YaRN (arXiv 2309.00071): fast pairs are kept, slow ones slowed by `factor`, those between blended;
    all made longer by a tenth of the factor's logarithm."""
    factor, original = positive(table, "factor"), positive(table, ORIGINAL)
    turns = {"beta_fast": 32.0, "beta_slow": 1.0} | {k: v for k, v in table.items() if v}

    def pair(key: str) -> float:
        count = positive(turns, key)
        return head_dim * math.log(original / (count * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair("beta_fast"), pair("beta_slow")
    if table.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    divisors = []
    for i in range(head_dim // 2):
        slowed = min(1.0, max(0.0, (i - low) / max(high - low, 1e-3)))
        divisors.append(1 / (slowed / factor + 1 - slowed))
    return Rope(base, tuple(divisors), longer_by(table, factor))


def longer_by(table: Table, factor: float) -> float:
    """How much longer YaRN makes queries and keys."""
    if table.get("attention_factor") is not None:
        return positive(table, "attention_factor")

    def longer(times: float) -> float:
        return 0.1 * times * math.log(factor) + 1.0 if factor > 1 else 1.0

    if table.get("mscale") and table.get("mscale_all_dim"):
        return longer(positive(table, "mscale")) / longer(positive(table, "mscale_all_dim"))
    return longer(1.0)


def positive(table: Table, key: str) -> float:
    value = table.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
        raise CheckpointError(f"config: rope scaling {key} is {value!r}, a positive number is due")
    return float(value)
