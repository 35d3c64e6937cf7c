"""`outsize doctor`: the machine, its ceilings, and what would run slowly on it and why."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import psutil
import torch

from outsize.home import home
from outsize.kernels import build
from outsize.kernels.find import native_in
from outsize.kernels.layouts import torch_reads_tiles
from outsize.plan import machine, probe


def examine() -> dict[str, Any]:
    """Measure this machine (some seconds), and keep it for `plan`. Sizes in bytes, rates a second."""
    folder = home()
    notes: list[str] = []
    there = next(p for p in (folder, *folder.parents) if p.is_dir())
    memory = psutil.virtual_memory()
    probe.set_threads()
    here = machine.measured(folder)
    return {
        "processor": probe.processor(),
        "cores": probe.cores(),
        "threads": torch.get_num_threads(),
        "instruction_sets": probe.instruction_sets(),
        "memory_bytes": memory.total,
        "memory_free_bytes": memory.available,
        "busy": here.busy,
        "measurements": len(here.measurements),
        "memory_bytes_per_s": here.memory_bytes_per_s,
        "bf16_flops": here.bf16_flops,
        "fp32_flops": here.fp32_flops,
        "disk_free_bytes": shutil.disk_usage(there).free,
        "disk_bytes_per_s": round(here.disk_bytes_per_s),
        "disk": [[size, threads, round(rate)] for size, threads, rate in here.disk],
        "torch": torch.__version__,
        "torch_kernels": torch.backends.cpu.get_cpu_capability(),
        "int4_kernel": torch_reads_tiles(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "compiler": build.compiler(),
        "native_kernels": native_in(folder / "native", notes.append) is not None,
        "native_note": notes[0] if notes else "",
        "home": str(folder),
    }


def complaints(seen: Mapping[str, Any]) -> list[str]:
    """What would run slowly here, why, and what helps."""
    out = []
    if seen["busy"]:
        out.append(
            f"the machine was busy while it was measured ({seen['busy']}): the figures are the best of "
            f"{seen['measurements']} measurements, and may be too low; run `outsize doctor` again when it is "
            "idle"
        )
    if not seen["int4_kernel"] and not seen["native_kernels"]:
        out.append(
            f"torch's int4 kernel here ({seen['torch_kernels']}) reads another layout than AVX-512's: "
            "4-bit tensors are packed in 8 bits, twice the bytes; install gcc or clang"
        )
    if seen["native_note"]:
        out.append(seen["native_note"])
    if seen["bf16_flops"] < 1.5 * seen["fp32_flops"]:
        out.append(
            "no fast bf16 arithmetic: products run in fp32, and long prompts take two to four times as long"
        )
    if seen["threads"] > seen["cores"]:
        out.append(f"{seen['threads']} threads on {seen['cores']} cores: use --threads")
    if seen["disk_free_bytes"] < 2e9:
        out.append(f"little room in {seen['home']}: set OUTSIZE_HOME to another disk")
    if "+cpu" not in seen["torch"] and seen["gpu"] is None:
        out.append(
            "torch is a GPU build without a GPU: it works, and takes 5 GB of disk that the CPU build "
            "does not (see README)"
        )
    return out


def lines(seen: Mapping[str, Any]) -> Iterator[str]:
    """The examination as text."""
    gb = {k: v / 1e9 for k, v in seen.items() if k.endswith(("bytes", "_s", "flops"))}
    rows = {
        "processor": f"{seen['processor']}, {seen['cores']} cores, {seen['threads']} threads used",
        "instructions": ", ".join(seen["instruction_sets"]) or "none that matter here",
        "memory": f"{gb['memory_bytes']:.1f} GB, {gb['memory_free_bytes']:.1f} GB free, "
        f"{gb['memory_bytes_per_s']:.1f} GB/s",
        "compute": f"{gb['bf16_flops']:.0f} GFLOP/s bf16, {gb['fp32_flops']:.0f} fp32",
        "disk": f"{gb['disk_free_bytes']:.1f} GB free, {gb['disk_bytes_per_s']:.2f} GB/s direct reads",
        "torch": f"{seen['torch']}, {seen['torch_kernels']} kernels, GPU: {seen['gpu'] or 'none'}",
        "row kernels": "native" if seen["native_kernels"] else "plain",
        "home": seen["home"],
    }
    for name, value in rows.items():
        yield f"{name:>12}  {value}"
    yield from _disk(seen["disk"])
    for text in complaints(seen):
        yield f"{'slow':>12}  {text}"


def _disk(disk: Sequence[tuple[int, int, float]]) -> Iterator[str]:
    """Direct reads in GB/s: a row for each size, a column for each number of threads."""
    counts = list(dict.fromkeys(n for _, n, _ in disk))
    yield f"{'direct reads':>12}  " + "".join(f"{f'x{n}':>7}" for n in counts) + "  (threads)"
    for size in dict.fromkeys(s for s, _, _ in disk):
        rates = [rate for s, _, rate in disk if s == size]
        cells = "".join(f"{rate / 1e9:7.2f}" for rate in rates)
        yield f"{f'{size >> 10} KiB':>12}  {cells}  GB/s"
