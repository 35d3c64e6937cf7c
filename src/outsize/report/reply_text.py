"""The line of figures below an answer."""

from __future__ import annotations

from collections.abc import Mapping

from outsize.engine.reply import Reply


def summary(reply: Reply, disk_bytes_per_s: float | None = None) -> str:
    """The line. `disk_bytes_per_s`: the measured rate of the disk, to compare with."""
    parts = [
        f"{reply.prompt_tokens} prompt tokens{_reused(reply)}, first token after {reply.first_token_s:.2f} s",
        f"{reply.new_tokens} tokens at {reply.tokens_per_s:.1f}/s",
        f"peak memory {reply.peak_memory_bytes / 1e6:,.0f} of {reply.budget_bytes / 1e6:,.0f} MB, "
        f"read {reply.bytes_read / 1e6:,.0f} MB",
    ]
    if reply.options["prefill"] != "full":
        parts.append(
            f"lossy: prefill={reply.options['prefill']} computed {reply.computed_share:.0%} of tokens times "
            "layers"
        )
    if reply.options["kv"] == "int8":
        parts.append("lossy: keys and values in 8 bits")
    if cost := reply.options.get("width_cost"):
        parts.append(f"{reply.width:.2f} of the feed-forwards computed on average, {cost}")
    if "layers_off" in reply.options:
        off = str(reply.options["layers_off"])
        parts.append(f"lossy: without the memory of layer{'s' * (',' in off)} {off}")
    if reply.options["neurons"] != "off":
        parts.append(str(reply.options["neurons"]))
    if reply.drafted:
        parts.append(
            f"{reply.accepted} of {reply.drafted} draft tokens accepted, "
            f"{reply.tokens_per_step:.2f} tokens a step"
        )
    most = float(str(reply.options["threads"]))
    if 0 < reply.threads < 0.95 * most:
        parts.append(
            f"{reply.threads:.1f} of {most:.0f} threads: other programs kept the processor busy"
        )
    if reply.experts is not None:
        what = "neuron bundles" if reply.options["neurons"] != "off" else "experts"
        parts.append(_experts(reply.experts, str(reply.options.get("table", what))))
    if reply.hit_rate < 1:
        rate = f"{reply.disk_bytes_per_s / 1e9:.2f} GB/s"
        if disk_bytes_per_s:
            rate += (
                f" ({reply.disk_bytes_per_s / disk_bytes_per_s:.0%} of the disk's measured rate)"
            )
        parts.append(
            f"{reply.bytes_per_token / 1e6:,.1f} MB a token from disk at {rate}, "
            f"hit rate {reply.hit_rate:.0%}, waited {reply.waited_s:.2f} s"
        )
    if reply.cached_reads:
        parts.append("read through the page cache: the pack's file system refuses direct reads")
    return f"[{'; '.join(parts)}]"


def _reused(reply: Reply) -> str:
    """How much of the prompt was not computed again, and what the prefix cache on disk read and wrote."""
    said = [f"{reply.reused_tokens} of them reused"] if reply.reused_tokens else []
    if reply.reused_bytes_read:
        said.append(f"{reply.reused_bytes_read / 1e6:,.0f} MB of keys and values read")
    if reply.kept_bytes_written:
        said.append(f"{reply.kept_bytes_written / 1e6:,.0f} MB of them written for later")
    return f" ({', '.join(said)})" if said else ""


def _experts(counts: Mapping[str, float], what: str) -> str:
    """What became of the requests for experts, bundles of neurons, or rows by token."""
    kinds = ("ready", "late", "cold", "capacity", "collision", "dropped", "substituted", "copied")
    said = ", ".join(f"{counts[k]:,.0f} {k}" for k in kinds if counts[k])
    asked = counts["hits"] + counts["misses"]
    share = counts["hits"] / asked if asked else 1.0
    return f"{what}: {asked:,.0f} asked for, {share:.0%} in memory" + (f" ({said})" if said else "")
