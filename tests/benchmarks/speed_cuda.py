"""Speed on a GPU, called by `speed.py --device cuda`: the grid under CUDA graphs; writes docs/results/speed-cuda.md.

Each implementation is captured in a graph of many calls, each with its own weights, so that no weight is in the GPU's
cache when it is read again. The lower bound for one token is the time in which the GPU copies as many bytes as the
factors, x and y have; its bandwidth, of bytes read and written, is measured by a copy.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tdkit import Decomposition, FactorizedMatrix, Kronecker, PermutedKronecker
from tdkit.evaluation.timing import side_by_side
from tdkit.models import preparation as prepare
from tdkit.support.tables import markdown_table

Row = dict[str, Any]
TOKENS = (1, 8, 512)
COPIED_BYTES = 2**30
CACHES = 4  # size of the weights of one graph, in multiples of the GPU's cache
MOST_CALLS = 256
SMALL_FACTORS = (  # GPT-2's layers as TQCompressor and KnGPT2 write them
    ((3072, 768), Kronecker(terms=1, a=(768, 384), b=(4, 2))),
    ((3072, 768), Kronecker(terms=4, a=(768, 384), b=(4, 2))),
    ((3072, 768), PermutedKronecker(terms=4, a=(768, 384), b=(4, 2))),
    ((768, 3072), PermutedKronecker(terms=4, a=(384, 768), b=(2, 4))),
)
COLUMNS = ("shape", "decomposition", "share", "tokens", "dense_us", "memory_path", "memory_us", "memory")
COLUMNS += ("speed_path", "speed_us", "speed", "floor_us", "memory_by_floor")
Fill = Callable[[Decomposition, tuple[int, int]], FactorizedMatrix]


def measure(
    cases: Sequence[tuple[tuple[int, int], Decomposition]], fill: Fill, dtype: torch.dtype, seconds: float, out: Path
) -> None:
    """Measure every case and store the results after each.

    Args:
        cases: shapes (out, in) and complete decompositions.
        fill: makes a matrix with random factors.
        seconds: for each timed graph.
        out: the folder of the JSON and the page.
    """
    copied = copy_bandwidth()
    device = torch.cuda.get_device_properties(0)
    results: dict[str, Any] = {
        "machine": {
            "gpu": device.name,
            "cache_mib": device.L2_cache_size / 2**20,
            "copy_gb_per_second": copied / 1e9,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "dtype": str(dtype).removeprefix("torch."),
        },
        "rows": [],
    }
    print(results["machine"], flush=True)
    for shape, kind in (*cases, *SMALL_FACTORS):
        for row in grid(shape, kind, fill, dtype, seconds, copied):
            print(row, flush=True)
            results["rows"].append(row)
        write(results, out)


def copy_bandwidth() -> float:
    """Bytes per second that the GPU reads and writes during a copy."""
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device="cuda").zero_()
    target = torch.empty_like(source)
    timing = side_by_side({"copy": lambda: target.copy_(source)}, device="cuda")["copy"]
    return 2 * COPIED_BYTES / timing.seconds


def grid(
    shape: tuple[int, int], kind: Decomposition, fill: Fill, dtype: torch.dtype, seconds: float, copied: float
) -> Iterator[Row]:
    """One matrix at every number of tokens: dense, and factors, preferring memory and (if that differs) speed."""
    rows, columns = shape
    bias = torch.randn(rows, device="cuda", dtype=dtype)
    matrix = fill(kind, shape).to("cuda", dtype)
    for order in matrix.buffers():
        order.copy_(torch.randperm(len(order)))
    factor_bytes = sum(each.numel() * each.element_size() for each in (*matrix.parameters(), *matrix.buffers()))
    weight = torch.randn(shape, device="cuda", dtype=dtype)
    weights = [weight.clone() for _ in range(calls(weight.numel() * dtype.itemsize))]
    small = [prepare(copy.deepcopy(matrix), prefer="memory", graphs=True) for _ in range(calls(factor_bytes))]
    fast = [prepare(copy.deepcopy(matrix), prefer="speed", graphs=True) for _ in weights]
    for tokens in TOKENS:
        x = torch.randn(tokens, columns, device="cuda", dtype=dtype)
        graphs = {"dense": (replay([partial(F.linear, x, weight, bias) for weight in weights]), len(weights))}
        paths = {"memory": small[0].path(tokens).name, "speed": fast[0].path(tokens).name}
        for name, matrices in (("memory", small), ("speed", fast)):
            if name == "memory" or paths["speed"] != paths["memory"]:
                graphs[name] = replay([partial(each.linear, x, bias) for each in matrices]), len(matrices)
        timings = side_by_side({n: call for n, (call, _) in graphs.items()}, seconds=seconds, device="cuda")
        taken = {name: timings[name].seconds / graphs[name][1] * 1e6 for name in graphs}
        taken.setdefault("speed", taken["memory"])
        floor = (factor_bytes + (x.numel() + tokens * rows) * dtype.itemsize) / copied * 1e6
        yield {
            "shape": f"{rows}x{columns}",
            "decomposition": kind.describe(),
            "share": round(matrix.params / (rows * columns), 4),
            "tokens": tokens,
            "dense_us": taken["dense"],
            "memory_path": paths["memory"],
            "memory_us": taken["memory"],
            "memory": taken["memory"] / taken["dense"],
            "speed_path": paths["speed"],
            "speed_us": taken["speed"],
            "speed": taken["speed"] / taken["dense"],
            "floor_us": floor,
            "memory_by_floor": taken["memory"] / floor,
        }


def calls(size: int) -> int:
    """How many weights of `size` bytes exceed the GPU's cache."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(MOST_CALLS, CACHES * cache // size))


@torch.inference_mode()
def replay(calls: Sequence[Callable[[], Tensor]]) -> Callable[[], None]:
    """A replay of all calls, captured in one CUDA graph after a warm-up of each."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def bars(rows: Sequence[Row]) -> list[list[str]]:
    """The targets, with the worst value of this run."""
    one = [row["memory_by_floor"] for row in rows if row["tokens"] == 1 and row["shape"] == "4096x4096"]
    wanted = [
        ("1 token, 4096x4096, factors, / time of copying their bytes", 2.0, one),
        ("any tokens, prefer=speed, / dense", 1.1, [row["speed"] for row in rows]),
    ]
    return [
        [name, f"<= {limit:g}", f"{max(found):.3g}", "yes" if max(found) <= limit else "no"]
        for name, limit, found in wanted
        if found
    ]


def write(results: dict[str, Any], folder: Path) -> None:
    """The JSON and the page."""
    (folder / "speed-cuda.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    machine, rows = results["machine"], results["rows"]
    cells = [
        [f"{row[name]:.3g}" if isinstance(row[name], float) else str(row[name]) for name in COLUMNS] for row in rows
    ]
    page = [
        "# Speed on a GPU\n",
        f"Written by `python tests/benchmarks/speed.py --device cuda --dtype {machine['dtype']}` on one "
        f"{machine['gpu']}, which copied {machine['copy_gb_per_second']:.0f} GB/s, bytes read and written; torch "
        f"{machine['torch']}, CUDA {machine['cuda']}. Microseconds of a call inside a CUDA graph of many calls, whose "
        f"weights fill the GPU's cache of {machine['cache_mib']:.0f} MiB {CACHES} times where memory allows. `memory` "
        "and `speed` are ratios to cuBLAS's dense product; the floor is the time of copying the bytes of the factors, "
        "x and y.\n",
        markdown_table(["bar", "wanted", "worst measured", "met"], bars(rows)),
        markdown_table([name.replace("_", " ") for name in COLUMNS], cells),
    ]
    (folder / "speed-cuda.md").write_text("\n".join(page), encoding="utf-8")
