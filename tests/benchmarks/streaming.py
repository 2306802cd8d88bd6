"""Memory and time of compressing a folder layer by layer, and what a 70B model would take.

    python tests/benchmarks/streaming.py make FOLDER          # a random model of 1.1B parameters, bf16, in shards
    python tests/benchmarks/streaming.py run FOLDER OUT       # plain: peak memory, seconds, seconds of the fits alone
    python tests/benchmarks/streaming.py run FOLDER OUT --calibrated --layers 1
    python tests/benchmarks/streaming.py estimate             # from docs/results/streaming.json, which `run` writes

The model has the architecture of LLaMA and the sizes of TinyLlama-1.1B. `run` works in a fresh process, whose peak
resident memory is taken as it is, Python, torch and transformers included. The seconds of the fits alone are those
spent inside the fits during the same run. Random moments take the place of a calibration's: the time and memory of a
fit do not depend on their values.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdkit import Calibration, LowRank, Metric, Policy, Rule, compress_folder
from tdkit.compression import stream
from tdkit.compression.fit import fit_step
from tdkit.models.huggingface import weightless_model
from tdkit.models.shards import INDEX, Entry, write_tensors
from tdkit.sources.on_disk import open_model
from tdkit.support.files import write_text

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results" / "streaming.json"
KEEP = 0.8  # params after / params before of the whole model
SIZES_1B = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
SIZES_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
SHARD_TENSORS = 24
CARD_FLOPS = 67e12  # float64 with tensor cores, of an 80 GB H100 SXM (vendor's data sheet)
CARD_BYTES = 80e9
DISK_BYTES = 2e9  # bytes per second of one fast local disk; an assumption


def write_random_model(folder: Path, sizes: dict[str, int], *, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a random model of LLaMA's architecture in shards of `SHARD_TENSORS` tensors, one tensor in memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(**sizes, tie_word_embeddings=False, architectures=["LlamaForCausalLM"])
    model = weightless_model(LlamaForCausalLM, config, dtype)
    config.save_pretrained(folder)
    parameters = list(model.named_parameters())
    count = math.ceil(len(parameters) / SHARD_TENSORS)
    weight_map = {}
    for number in range(count):
        chosen = parameters[number * SHARD_TENSORS : (number + 1) * SHARD_TENSORS]
        path = folder / f"model-{number + 1:05}-of-{count:05}.safetensors"
        entries = {
            name: Entry(dtype, tuple(p.shape), partial(_values, tuple(p.shape), dtype, number * SHARD_TENSORS + place))
            for place, (name, p) in enumerate(chosen)
        }
        write_tensors(path, entries, {"format": "pt"})
        weight_map |= dict.fromkeys(entries, path.name)
    write_text(folder / INDEX, json.dumps({"metadata": {}, "weight_map": weight_map}))


def _values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    draw = torch.Generator().manual_seed(seed)
    return torch.empty(shape, dtype=dtype).normal_(0, 0.02, generator=draw)


def random_calibration(shapes: dict[str, tuple[int, int]]) -> Calibration:
    """Returns moments of full rank for some layers."""

    def moment(n: int) -> Tensor:
        rows = torch.randn(n + 64, n, generator=torch.Generator().manual_seed(n))
        return (rows.T @ rows).double() / len(rows)

    calibration = Calibration({})
    for name, (out, width) in shapes.items():
        calibration.add({name: Metric(moment(width), moment(out))}, spill=True)
    return calibration


def policy(layers: int | None) -> Policy:
    """Returns a policy for the matrices of all blocks, or of the first ones with the same share in each."""
    if layers is None:
        return Policy([Rule("model.layers.*", LowRank())], budget=KEEP)
    inside = "|".join(str(number) for number in range(layers))
    return Policy([Rule(rf"re:model\.layers\.({inside})\..*", LowRank(), budget=0.75)], allocation="uniform")


def measure(folder: Path, out: Path, *, calibrated: Path | None, layers: int | None) -> dict[str, Any]:
    """Compress a folder in this process and return its figures."""
    spent = [0.0]

    def timed(*args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        matrix = fit_step(*args, **options)
        spent[0] += time.perf_counter() - start
        return matrix

    stream.fit_step = timed  # type: ignore[attr-defined]
    start = time.perf_counter()
    compress_folder(folder, policy(layers), out, calibration=calibrated, overwrite=True)
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "fit_seconds": spent[0],
        "ratio": seconds / spent[0],
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "threads": torch.get_num_threads(),
    }


def run(folder: Path, out: Path, *, calibrated: bool, layers: int | None) -> None:
    """Measure in a fresh process and note the figures."""
    moments = out.with_name(f"{out.name}.moments")
    opened = open_model(folder)
    params = sum(parameter.numel() for parameter in opened.model.parameters())
    flops = sum(_flops(*shape) for shape in _matrices(opened.model.config) * (opened.model.config.num_hidden_layers))
    if calibrated:
        names = [name for name, _ in opened.model.named_modules()]
        chosen = {
            name: opened.model.get_submodule(name) for name in names if policy(layers or 1).rules[0].names_match(name)
        }
        shapes = {name: tuple(m.weight.shape) for name, m in chosen.items() if isinstance(m, torch.nn.Linear)}
        random_calibration(shapes).save(moments, overwrite=True)  # type: ignore[arg-type]
    command = [sys.executable, __file__, "measure", str(folder), str(out)]
    command += ["--moments", str(moments)] if calibrated else []
    command += ["--layers", str(layers)] if layers is not None else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    figures = {**json.loads(done.stdout.splitlines()[-1]), "params": params, "flops": flops, "layers": layers}
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    write_text(RESULTS, json.dumps({**known, "calibrated" if calibrated else "plain": figures}, indent=2) + "\n")
    shutil.rmtree(moments, ignore_errors=True)
    print(json.dumps(figures, indent=2))


def _matrices(config: Any) -> list[tuple[int, int]]:
    """Returns the shapes of the matrices of one block."""
    width, inner = config.hidden_size, config.intermediate_size
    keys = width // config.num_attention_heads * config.num_key_value_heads
    return [
        (width, width),
        (keys, width),
        (keys, width),
        (width, width),
        (inner, width),
        (inner, width),
        (width, inner),
    ]


def _flops(rows: int, columns: int) -> float:
    """Returns the operations of a low-rank fit: a Gram matrix, its eigenvectors (9 n^3), and one product."""
    near, far = sorted((rows, columns))
    return 4.0 * near**2 * far + 9.0 * near**3


def estimate() -> str:
    """Returns what a 70B model would take, from the measured figures and the assumptions at the top of this file."""
    from transformers import LlamaConfig

    measured = json.loads(RESULTS.read_text(encoding="utf-8"))["plain"]
    config = LlamaConfig(**SIZES_70B)
    matrices = _matrices(config) * config.num_hidden_layers
    flops = sum(_flops(*shape) for shape in matrices)
    params = sum(rows * columns for rows, columns in matrices) + 2 * config.vocab_size * config.hidden_size
    rate = measured["flops"] / measured["fit_seconds"]
    overhead = measured["ratio"]
    moved = 2 * params * (1 + KEEP)  # bytes read and written in bf16; factors are written and read once more
    moved += 2 * 2 * params * KEEP
    largest = max(matrices, key=lambda shape: shape[0] * shape[1])
    near, far = sorted(largest)
    plain = 8 * (3 * near * far + 4 * near**2)
    with_moments = plain + 8 * (3 * far**2 + 3 * near**2)
    lines = [
        f"parameters: {params / 1e9:.1f}B; operations of the plain fits: {flops:.2e}",
        f"measured: {rate / 1e9:.1f} GFLOP/s in float64 in the fits of the 1.1B model, "
        f"{overhead:.2f} x their time for everything",
        f"on the machine measured: {overhead * flops / rate / 3600:.1f} hours",
        f"memory for the largest fit ({largest[0]} x {largest[1]}, float64): {plain / 1e9:.1f} GB plain, "
        f"{with_moments / 1e9:.1f} GB calibrated, of {CARD_BYTES / 1e9:.0f} GB",
        f"files: {moved / 1e9:.0f} GB read and written, {moved / DISK_BYTES / 60:.0f} minutes at "
        f"{DISK_BYTES / 1e9:.0f} GB/s",
    ]
    for share in (0.05, 0.2):
        for cards in (1, 8):
            fits = flops / (CARD_FLOPS * share) / cards
            lines.append(
                f"estimate, {cards} card{'s' if cards > 1 else ''} at {share:.0%} of {CARD_FLOPS / 1e12:.0f} TFLOP/s: "
                f"fits {fits / 60:.0f} minutes, with the files {(fits + moved / DISK_BYTES) / 60:.0f} minutes"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "run", "measure", "estimate"])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--calibrated", action="store_true")
    parser.add_argument("--moments", type=Path)
    parser.add_argument("--layers", type=int)
    given = parser.parse_args()
    if given.what == "estimate":
        print(estimate())
    elif given.what == "make":
        write_random_model(given.folder, SIZES_1B)
    elif given.what == "run":
        run(
            given.folder,
            given.out,
            calibrated=given.calibrated,
            layers=given.layers or (1 if given.calibrated else None),
        )
    else:
        print(json.dumps(measure(given.folder, given.out, calibrated=given.moments, layers=given.layers)))


if __name__ == "__main__":
    main()
