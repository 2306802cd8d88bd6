"""Memory and time of compressing a folder layer by layer, and what a 70B model would take.

    python tests/benchmarks/streaming.py make FOLDER          # a random model of 1.1B parameters, bf16, in shards
    python tests/benchmarks/streaming.py run FOLDER OUT       # plain: peak memory, seconds, seconds of the fits alone
    python tests/benchmarks/streaming.py run FOLDER OUT --calibrated --layers 1
    python tests/benchmarks/streaming.py calibrate FOLDER     # the blocks forward and backward, for one layer
    python tests/benchmarks/streaming.py report               # a table and the estimate, for docs/streaming.md

The figures are kept in docs/results/streaming.json. The model has the architecture of LLaMA and the sizes of
TinyLlama-1.1B. Each measurement runs in a fresh process, whose peak resident memory is taken as it is, with Python,
torch and transformers. The seconds of the fits alone are those spent inside the fits during the same run. Random
moments take the place of a calibration's: the time and memory of a fit do not depend on their values.
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

from tdkit import Calibration, LowRank, Metric, Policy, Rule, calibrate_folder, compress_folder
from tdkit.compression import stream
from tdkit.compression.fit import fit_step
from tdkit.models.huggingface import weightless_model
from tdkit.models.shards import INDEX, Entry, write_tensors
from tdkit.sources.on_disk import open_model
from tdkit.support.files import write_text
from tdkit.support.tables import markdown_table

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
TOKENS_70B = 16384  # of the calibration
DISK_BYTES = 2e9  # bytes per second of one fast local disk; an assumption
SHARES = (0.02, 0.1)  # of CARD_FLOPS that the fits may reach, which was not measured; an assumption


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
        "peak_bytes": peak(),
        "threads": torch.get_num_threads(),
    }


def run(folder: Path, out: Path, *, calibrated: bool, layers: int | None) -> None:
    """Measure in a fresh process and note the figures."""
    moments = out.with_name(f"{out.name}.moments")
    opened = open_model(folder)
    config = opened.model.config
    params = sum(parameter.numel() for parameter in opened.model.parameters())
    keys = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    block = matrices(config.hidden_size, config.intermediate_size, keys)
    flops = (layers or config.num_hidden_layers) * sum(operations(*shape) for shape in block)
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
    shutil.rmtree(moments, ignore_errors=True)
    note("calibrated" if calibrated else "plain", figures)


def matrices(width: int, inner: int, keys: int) -> list[tuple[int, int]]:
    """Returns the shapes of the matrices of one block of LLaMA; `keys` is the width of all key heads together."""
    return [
        (width, width),
        (keys, width),
        (keys, width),
        (width, width),
        (inner, width),
        (inner, width),
        (width, inner),
    ]


def operations(rows: int, columns: int) -> float:
    """Returns the operations of a low-rank fit: a Gram matrix, its eigenvectors (9 n^3), and one product."""
    near, far = sorted((rows, columns))
    return 4.0 * near**2 * far + 9.0 * near**3


def calibrate(folder: Path, tokens: int) -> None:
    """Stream a calibration of one layer in a fresh process and note the figures."""
    command = [sys.executable, __file__, "pass", str(folder), "--tokens", str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    note("calibration", json.loads(done.stdout.splitlines()[-1]))


def measure_pass(folder: Path, tokens: int) -> dict[str, Any]:
    """Calibrate one layer in this process: the blocks run forward and backward, and almost no moments are held."""
    batches = [torch.arange(tokens)[None] % 1000]
    start = time.perf_counter()
    calibrate_folder(folder, batches, names=["model.layers.0.self_attn.k_proj"])
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_bytes": peak(), "tokens": tokens, "threads": torch.get_num_threads()}


def note(name: str, figures: dict[str, Any]) -> None:
    """Keep figures in the results."""
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    write_text(RESULTS, json.dumps({**known, name: figures}, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def peak() -> int:
    """Returns the peak resident memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report() -> str:
    """Returns the measured figures and the estimate as Markdown."""
    known = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows = [
        ("low rank, plain, the 154 matrices of all blocks", known["plain"]),
        ("low rank, calibrated, the 7 matrices of one block", known["calibrated"]),
        (f"calibration on {known['calibration']['tokens']} tokens, moments of one small layer", known["calibration"]),
    ]
    table = markdown_table(
        ["1.1B parameters, bf16, one thread", "peak memory, GiB", "seconds", "by the fits alone"],
        [
            [
                what,
                f"{figures['peak_bytes'] / 2**30:.2f}",
                f"{figures['seconds']:,.0f}",
                f"{figures['ratio']:.2f}" if "ratio" in figures else "",
            ]
            for what, figures in rows
        ],
    )
    return "\n".join([table.strip(), "", *(f"- {line}" for line in estimate(known["plain"]))])


def estimate(measured: dict[str, Any]) -> list[str]:
    """Returns what a 70B model would take, from measured figures and the assumptions at the top of this file."""
    width, inner, blocks = (SIZES_70B[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    keys = width // SIZES_70B["num_attention_heads"] * SIZES_70B["num_key_value_heads"]
    block = matrices(width, inner, keys)
    flops = blocks * sum(operations(*shape) for shape in block)
    block_params = sum(rows * columns for rows, columns in block)
    around = 2 * SIZES_70B["vocab_size"] * width
    params = blocks * block_params + around
    rate = measured["flops"] / measured["fit_seconds"]
    files = 2 * params * (1 + KEEP) + 3 * 2 * params * KEEP  # read; factors written, read twice, written
    plain = 8 * (3 * width * inner + 4 * width**2)
    calibrated = plain + 8 * (3 * inner**2 + 3 * width**2)
    moments = 8 * sum(rows**2 + columns**2 for rows, columns in block)
    hidden = 2 * (blocks + 1) * width * TOKENS_70B
    minutes = files / DISK_BYTES / 60
    lines = [
        f"Parameters: {params / 1e9:.1f}B. Operations of the plain fits: {flops:.1e} in float64 (counted: Gram matrix, "
        "eigenvectors at 9 n^3, one product).",
        f"On one thread of the machine of the table, at the {rate / 1e9:.0f} GFLOP/s measured: "
        f"{flops / rate / 3600:,.0f} hours.",
        f"Memory of the largest fit, {width} x {inner}: {plain / 1e9:.0f} GB plain, "
        f"{calibrated / 1e9:.0f} GB calibrated, of {CARD_BYTES / 1e9:.0f} GB.",
        f"Memory of a calibration: {2 * block_params / 1e9:.1f} GB for a block, {2 * around / 1e9:.1f} GB for "
        "embedding and head, the activations of one batch, and moments of at most `limit_bytes` (8 GB) or one weight.",
        f"On disk: {hidden / 1e9:.0f} GB of hidden states for {TOKENS_70B:,} tokens, "
        f"{blocks * moments / 1e12:.1f} TB of moments in float64.",
        f"Files: {files / 1e9:,.0f} GB read and written, {minutes:.0f} minutes at "
        f"{DISK_BYTES / 1e9:.0f} GB/s (assumed).",
    ]
    for share in SHARES:
        one, eight = (flops / (CARD_FLOPS * share) / cards / 60 + minutes for cards in (1, 8))
        lines.append(
            f"If a card reaches {share:.0%} (assumed) of its {CARD_FLOPS / 1e12:.0f} TFLOP/s in float64: "
            f"{one:.0f} minutes on one card, {eight:.0f} on eight."
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "run", "measure", "calibrate", "pass", "report"])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--calibrated", action="store_true")
    parser.add_argument("--moments", type=Path)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tokens", type=int, default=512)
    given = parser.parse_args()
    if given.what == "report":
        print(report())
    elif given.what == "make":
        write_random_model(given.folder, SIZES_1B)
    elif given.what == "calibrate":
        calibrate(given.folder, given.tokens)
    elif given.what == "pass":
        print(json.dumps(measure_pass(given.folder, given.tokens)))
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
