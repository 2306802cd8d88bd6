"""Speed of the factorised product, against dense layers and other libraries; writes docs/results/speed.md.

    python tests/benchmarks/speed.py [--threads 2] [--seconds 0.5] [--parts eval,decode,train,convolution,...]
    python tests/benchmarks/speed.py --device cuda --dtype bfloat16  # the grid under CUDA graphs: speed-cuda.md

Calls alternate in one process and ratios are medians of paired ratios, so that other load on the machine slows both
sides. The other libraries (peft, tltorch, pyfastkron) are measured if they are installed; the page names missing ones.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tdkit
from tdkit import Decomposition, FactorizedMatrix, Kronecker, LowRank, PermutedKronecker, Policy, Rule, TTMatrix
from tdkit.evaluation.speed import ready, unfitted
from tdkit.evaluation.timing import keep_freed_memory, saved_bytes, side_by_side
from tdkit.models.hosts.linear import FactorizedLinear
from tdkit.models.preparation import cached_bytes
from tdkit.products.low_rank import padded_rank
from tdkit.support.tables import markdown_table

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, it finds only what lies beside it
from tests.benchmarks import speed_convolutions, speed_experts, speed_recurrent, speed_shrunk
from tests.benchmarks.calls import Row, filled, inferring

RESULTS = Path(__file__).parents[2] / "docs" / "results"
SHAPES = ((3072, 768), (768, 3072), (4096, 4096))  # (out, in)
SHARES = (0.05, 0.2, 0.4, 0.6, 0.8)
KINDS = (LowRank(), Kronecker(), PermutedKronecker(), TTMatrix())
STACK_BYTES = 2**26  # of dense weights in the stack for one token: twice a large last-level cache
SQUARE_KRONECKER = Kronecker(terms=4, a=(64, 64), b=(64, 64))
GRID = ["shape", "decomposition", "share", "dense_ms", "multiply_adds", "memory_path", "memory", "speed_path", "speed"]
DECODING = 3  # times as long as other calls, since those of one token are short and other load disturbs them more


def evaluation(shapes: Sequence[tuple[int, int]], tokens: int, seconds: float) -> Iterator[Row]:
    """The grid of shapes, decompositions and shares for a number of tokens, preferring memory and preferring speed.

    At one token each call uses the next layer of a stack that exceeds the CPU's cache, as decoding by a whole model
    does. At 512 tokens, where the products take most of the time, the same layer is called again.
    """
    for shape, kind, share in cases_of(shapes):
        count = max(2, math.ceil(STACK_BYTES / (4 * math.prod(shape)))) if tokens == 1 else 1
        x, bias = torch.randn(tokens, shape[1]), torch.randn(shape[0])
        small = [filled(kind, shape) for _ in range(count)]
        fast = copy.deepcopy(small)
        dense = []
        for matrix in fast:  # what it caches, and the dense weight beside it: where a weight lies decides up to 10%
            matrix.dispatcher.configure("speed")
            inferring(partial(matrix.linear, x, bias))()
            dense.append(torch.randn(shape))
        weights = itertools.cycle(dense)
        calls = {"dense": lambda x=x, bias=bias, weights=weights: F.linear(x, next(weights), bias)}
        calls["memory"] = in_turn(small, x, bias)
        pads = isinstance(kind, LowRank) and tokens > 1
        if pads or fast[0].path(tokens).name != small[0].path(tokens).name:
            calls["speed"] = in_turn(fast, x, bias)
        if pads:
            calls["bare"] = bare_products(small[0], x, bias)
        timings = side_by_side({n: inferring(call) for n, call in calls.items()}, seconds=seconds, min_rounds=15)
        path = small[0].path(tokens)
        yield {
            "shape": f"{shape[0]}x{shape[1]}",
            "decomposition": kind.describe(),
            "share": round(share, 4),
            "dense_ms": timings["dense"].seconds * 1e3,
            "multiply_adds": path.multiply_adds / (tokens * shape[0] * shape[1]),
            "memory_path": path.name,
            "memory": timings["memory"].ratio,
            "speed_path": fast[0].path(tokens).name,
            "speed": timings.get("speed", timings["memory"]).ratio,
            "bare": timings["bare"].ratio if "bare" in timings else None,
        }


def bare_products(matrix: FactorizedMatrix, x: Tensor, bias: Tensor) -> Callable[[], object]:
    """The two matrix products of a low-rank pair only, with the rank padded in advance: a lower bound of the time."""
    left, right = padded_rank(*(factor.detach() for factor in matrix.parameters()))
    return lambda: F.linear(F.linear(x, right), left, bias)


def in_turn(matrices: Sequence[FactorizedMatrix], x: Tensor, bias: Tensor) -> Callable[[], object]:
    """A call that multiplies by the next matrix of a cycle."""
    turns = itertools.cycle(matrices)
    return lambda: next(turns).linear(x, bias)


def cases_of(shapes: Sequence[tuple[int, int]]) -> list[tuple[tuple[int, int], Decomposition, float]]:
    """Shape, decomposition and ratio of parameters of every case of the grid."""
    cases = [
        (shape, kind.complete(shape, int(s * shape[0] * shape[1])), s)
        for shape in shapes
        for kind in KINDS
        for s in SHARES
    ]
    return [*cases, ((4096, 4096), SQUARE_KRONECKER, SQUARE_KRONECKER.num_params((4096, 4096)) / 4096**2)]


def training(seconds: float) -> list[Row]:
    """Forward and backward of one layer at 512 tokens, and the bytes saved for backward."""
    shape, rows = (3072, 768), []
    x, gradient = torch.randn(512, shape[1], requires_grad=True), torch.randn(512, shape[0])
    dense = nn.Linear(shape[1], shape[0])
    kinds = (TTMatrix(ranks=16), LowRank(rank=245), SQUARE_768, PermutedKronecker(terms=4, a=(48, 24), b=(64, 32)))
    for kind in kinds:
        layer = FactorizedLinear(filled(kind, shape), nn.Parameter(torch.zeros(shape[0]))).train()
        plain = lambda layer=layer: F.linear(x, layer.matrix.dense(), layer.bias)  # noqa: E731
        calls = {"dense": lambda: dense(x), "ours": lambda layer=layer: layer(x), "plain autograd": plain}
        timings = side_by_side({n: (lambda c=c: c().backward(gradient)) for n, c in calls.items()}, seconds=seconds)
        saved = {name: saved_bytes(call) / 2**20 for name, call in calls.items()}
        for name, timing in timings.items():
            rows.append(
                {
                    "decomposition": kind.describe(),
                    "how": name,
                    "ms": timing.seconds * 1e3,
                    "ratio": timing.ratio,
                    "saved_mib": saved[name],
                    "saved_ratio": saved[name] / saved["dense"],
                }
            )
            print(rows[-1], flush=True)
    return rows


SQUARE_768 = Kronecker(terms=4, a=(48, 24), b=(64, 32))


def whole_model(seconds: float) -> list[Row]:
    """A model of GPT-2 small's size at 66%: 64 tokens generated one by one, and a training step of 512."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    rules = [Rule("*.wte", keep=True), Rule("lm_head", keep=True), Rule("*.wpe", keep=True)]
    rows = []
    for kind in (LowRank(), Kronecker(), TTMatrix()):
        small = copy.deepcopy(model)
        plan = tdkit.plan(small, Policy([*rules[:1], rules[2], Rule("*.h.*", kind)], budget=0.66))
        unfitted(small, plan)
        dense = copy.deepcopy(model)  # GPT-2's own layers
        ids = torch.arange(512).unsqueeze(0)
        for what in ("generate 64", "training step"):
            train = what == "training step"
            for each in (dense, small):
                ready(each, train, "speed")
                for module in each.modules():
                    if isinstance(module, nn.Dropout):
                        module.p = 0.0

            act = partial(_step, ids=ids) if train else partial(_generate, ids=ids[:, :8])
            calls = {"dense": partial(act, dense), "ours": partial(act, small)}
            timings = side_by_side(calls, seconds=seconds * 4, min_rounds=3 if train else 5)
            rows.append(
                {
                    "decomposition": kind.name,
                    "params_ratio": plan.ratio,
                    "what": what,
                    "dense_ms": timings["dense"].seconds * 1e3,
                    "ms": timings["ours"].seconds * 1e3,
                    "ratio": timings["ours"].ratio,
                    "cached_mib": cached_bytes(small) / 2**20,
                }
            )
            print(rows[-1], flush=True)
    return rows


@torch.inference_mode()
def _generate(model: Any, ids: Tensor) -> Tensor:
    tokens: Tensor = model.generate(ids, max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=0)
    return tokens


def _step(model: nn.Module, ids: Tensor) -> None:
    model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad()


def peers(seconds: float) -> tuple[list[Row], list[str]]:
    """Other implementations of the same product, 768 -> 3072, 512 tokens."""
    shape, x, absent, rows = (3072, 768), torch.randn(512, 768), [], []
    weight = torch.randn(shape)
    ours = filled(SQUARE_768, shape)
    train = filled(TTMatrix(ranks=16), shape)
    terms = [(a.contiguous(), b.contiguous()) for a, b in zip(ours.a.detach(), ours.b.detach(), strict=True)]
    groups: dict[str, dict[str, Callable[[], object]]] = {
        "Kronecker, 4 terms of 48x24 and 64x32": {
            "dense": lambda: F.linear(x, weight),
            "tdkit, factors": lambda: ours.linear(x),
            "torch.kron on every forward": lambda: F.linear(x, sum(torch.kron(a, b) for a, b in terms)),
            "einsum as written": lambda: torch.einsum("raj,rbk,tjk->tab", ours.a, ours.b, x.view(-1, 24, 32)),
        },
        "TT-matrix, 3 cores, rank 16": {
            "dense": lambda: F.linear(x, weight),
            "tdkit, prefer=memory": lambda: train.linear(x),
        },
    }
    caching = copy.deepcopy(train)
    caching.dispatcher.configure("speed")
    groups["TT-matrix, 3 cores, rank 16"]["tdkit, prefer=speed"] = lambda: caching.linear(x)
    try:
        from pyfastkron.fastkrontorch import gemkm

        pairs = [(a.T.contiguous(), b.T.contiguous()) for a, b in terms]
        own = sum(gemkm(x, list(pair)) for pair in pairs)
        torch.testing.assert_close(own, ours.linear(x).detach(), rtol=1e-3, atol=1e-3)
        groups["Kronecker, 4 terms of 48x24 and 64x32"]["pyfastkron, term by term"] = lambda: sum(
            gemkm(x, list(pair)) for pair in pairs
        )
    except ImportError as error:
        absent.append(f"pyfastkron ({error})")
    try:
        from peft import LoKrConfig, get_peft_model

        base = nn.Sequential(nn.Linear(768, 3072, bias=False))
        config = LoKrConfig(r=2048, alpha=1, target_modules=["0"], decompose_factor=24, init_weights=False)
        lokr = get_peft_model(base, config).eval()
        one = filled(Kronecker(terms=1, a=(24, 24)), shape)
        groups["One Kronecker term added to a frozen dense layer"] = {
            "dense": lambda: F.linear(x, weight),
            "tdkit, dense + one term": lambda: F.linear(x, weight) + one.linear(x),
            "peft LoKr": lambda: lokr(x),
        }
    except ImportError as error:
        absent.append(f"peft ({error})")
    try:
        import tltorch

        dense = nn.Linear(768, 3072, bias=False)
        modes: Row = {
            "auto_tensorize": False,
            "in_tensorized_features": (12, 8, 8),
            "out_tensorized_features": (16, 16, 12),
        }
        for how in ("factorized", "reconstructed"):
            layer = tltorch.FactorizedLinear.from_linear(
                dense, **modes, factorization="blocktt", rank=16, implementation=how, bias=False
            ).eval()
            groups["TT-matrix, 3 cores, rank 16"][f"tltorch, {how}"] = lambda layer=layer: layer(x)
    except ImportError as error:
        absent.append(f"tltorch ({error})")
    for group, calls in groups.items():
        timings = side_by_side({name: inferring(call) for name, call in calls.items()}, seconds=seconds)
        for name, timing in timings.items():
            rows.append({"product": group, "how": name, "ms": timing.seconds * 1e3, "ratio": timing.ratio})
            print(rows[-1], flush=True)
    return rows, absent


def write(results: dict[str, Any]) -> None:
    """The JSON and the page."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "speed.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    machine = results["machine"]
    parts = [
        "# Speed\n",
        f"Written by `python tests/benchmarks/speed.py`: float32, {machine['threads']} threads of {machine['cpus']} "
        f"CPUs, torch {machine['torch']}, load average {machine['load']:.1f} when it began, "
        "freed memory kept by the C library (`tdkit.evaluation.timing.keep_freed_memory`). Ratios are medians of "
        "paired ratios to the dense call of the same round: below 1 is faster than dense. Every bar is listed with "
        "what was measured; a ratio above its bar is a miss.\n",
        "## Bars\n",
        markdown_table(["bar", "wanted", "worst measured", "met"], bars(results)),
    ]
    columns = {
        "eval": ("Inference, 512 tokens", GRID),
        "decode": ("Inference, one token", GRID),
        "train": (
            "Training, 768 to 3072, 512 tokens",
            ["decomposition", "how", "ms", "ratio", "saved_mib", "saved_ratio"],
        ),
        "convolution": ("Convolutions, 8 images, at half the multiply-adds", speed_convolutions.COLUMNS),
        "experts": ("Experts, Mixtral's shapes scaled down by 8", speed_experts.COLUMNS),
        "recurrent": ("Recurrent layers at half the parameters, one sequence", speed_recurrent.COLUMNS),
        "model": (
            "GPT-2 small's size at 66%",
            ["decomposition", "params_ratio", "what", "dense_ms", "ms", "ratio", "cached_mib"],
        ),
        "shrunk": ("SmolLM2-135M, 60% of its blocks, only smaller dense layers, the whole model", speed_shrunk.COLUMNS),
        "peers": ("Side by side, 768 to 3072, 512 tokens", ["product", "how", "ms", "ratio"]),
    }
    for part, (title, names) in columns.items():
        if results.get(part):
            rows = [
                [f"{cell:.3g}" if isinstance(cell := row.get(n, ""), float) else str(cell) for n in names]
                for row in results[part]
            ]
            parts += [f"## {title}\n", markdown_table([n.replace("_", " ") for n in names], rows)]
    if results.get("absent"):
        parts.append("Not installed in this run: " + "; ".join(results["absent"]) + ".\n")
    (RESULTS / "speed.md").write_text("\n".join(parts), encoding="utf-8")


def bars(results: dict[str, Any]) -> list[list[str]]:
    """Each target with the worst value of this run."""
    listed: list[list[str]] = []

    def bar(name: str, limit: float, values: list[float]) -> None:
        if values:
            listed.append([name, f"<= {limit:g}", f"{max(values):.3g}", "yes" if max(values) <= limit else "no"])

    many, one, train, model = (results.get(part, []) for part in ("eval", "decode", "train", "model"))
    low_rank, low_rank_one = ([r for r in grid if r["decomposition"].startswith("low_rank")] for grid in (many, one))
    bar("512 tokens, prefer=speed, any, / dense", 1.1, [r["speed"] for r in many])
    bar(
        "512 tokens, low-rank, ratio / its share of the multiply-adds",
        1.25,
        [r["speed"] / r["multiply_adds"] for r in low_rank],
    )
    bare = [r["bare"] / r["multiply_adds"] for r in low_rank if r.get("bare")]
    if bare:
        listed.append(
            ["the same of torch's two products alone, the rank padded in advance", "", f"{max(bare):.3g}", ""]
        )
    bar("1 token, prefer=speed, any, / dense", 1.1, [r["speed"] for r in one])
    for share, times in ((0.4, 1.7), (0.2, 3.0)):
        picked = [r["memory"] for r in low_rank_one if r["share"] == share]
        bar(f"1 token, low-rank at {share:.0%}, / dense ({times:g} x faster)", round(1 / times, 3), picked)
    square = [r["memory"] for r in one if r["decomposition"] == SQUARE_KRONECKER.describe()]
    bar("1 token, 4 terms of 64x64 and 64x64 at 4096, / dense (15 x faster)", round(1 / 15, 3), square)
    convolutions = results.get("convolution", [])
    bar("convolutions, 8 images, prefer=speed, any, / dense", 1.1, [r["speed"] for r in convolutions])
    name = "3x3 convolutions at half the multiply-adds, low rank and Tucker, / dense"
    bar(name, 0.75, speed_convolutions.half_of_3x3(convolutions))
    bar("experts, prefer=speed, any, / dense", 1.1, [r["speed"] for r in results.get("experts", [])])
    recurrent = results.get("recurrent", [])
    bar("recurrent, prefer=speed, any, / dense", 1.1, [r["speed"] for r in recurrent])
    bar("recurrent, as they are compressed, any, / dense", 1.1, [r["auto"] for r in recurrent])
    ours = [r for r in train if r["how"] == "ours" and r["decomposition"].startswith("tt_matrix")]
    bar("training step, TT-matrix rank 16, / dense", 1.4, [r["ratio"] for r in ours])
    bar("saved for backward, TT-matrix rank 16, / dense", 0.25, [r["saved_ratio"] for r in ours])
    bar(
        "GPT-2 small's size at 66%, 64 tokens generated, / dense",
        1.0,
        [r["ratio"] for r in model if r["what"] == "generate 64"],
    )
    bar(
        "GPT-2 small's size at 66%, training step, / dense",
        1.15,
        [r["ratio"] for r in model if r["what"] == "training step"],
    )
    shrunk = [r["ratio"] for r in results.get("shrunk", []) if r["what"] in ("512 tokens", "1 token")]
    bar("SmolLM2 at 60%, only smaller dense layers, 512 tokens and 1 token, / dense", 0.72, shrunk)
    plain = [r["plain_ratio"] for r in results.get("shrunk", []) if r["what"] in ("512 tokens", "1 token")]
    if plain:
        listed.append(["the same of a LLaMA that was made with these sizes", "", f"{max(plain):.3g}", ""])
    return listed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each timed call")
    parser.add_argument(
        "--parts",
        default="train,convolution,experts,recurrent,model,shrunk,peers,eval,decode",
        help="what to measure again; the rest is kept",
    )
    parser.add_argument("--largest", type=int, default=4096, help="leave larger shapes out of the grid")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="on a GPU")
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    shapes = [shape for shape in SHAPES if max(shape) <= options.largest]
    if options.device == "cuda":
        if not torch.cuda.is_available():
            parser.error("--device cuda: torch finds no CUDA device here; run this on a machine with a GPU")
        from speed_cuda import measure  # beside this script, and of no use without a GPU

        cases = [(shape, kind) for shape, kind, _ in cases_of(shapes)]
        measure(cases, filled, getattr(torch, options.dtype), options.seconds, RESULTS)
        return
    if options.dtype != "float32":
        parser.error(f"--dtype {options.dtype}: the figures of a CPU are in float32")
    path = RESULTS / "speed.json"
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    results["machine"] = {
        "command": " ".join(sys.argv[1:]),
        "threads": options.threads,
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "load": os.getloadavg()[0],
        "processor": platform.processor(),
    }
    for part in options.parts.split(","):
        if part in ("eval", "decode"):
            tokens, seconds = (512, options.seconds) if part == "eval" else (1, DECODING * options.seconds)
            results[part] = []
            for row in evaluation(shapes, tokens, seconds):
                print(row, flush=True)
                results[part].append(row)
                write(results)
        elif part == "train":
            results["train"] = training(options.seconds)
        elif part == "convolution":
            results["convolution"] = speed_convolutions.measure(options.seconds)
        elif part == "experts":
            results["experts"] = speed_experts.measure(options.seconds)
        elif part == "recurrent":
            results["recurrent"] = speed_recurrent.measure(options.seconds)
        elif part == "model":
            results["model"] = whole_model(options.seconds)
        elif part == "shrunk":
            results["shrunk"] = speed_shrunk.measure(options.seconds)
        elif part == "peers":
            results["peers"], results["absent"] = peers(options.seconds)
        else:
            parser.error(
                f"--parts {part} is none of eval, decode, train, convolution, experts, recurrent, model, shrunk, peers"
            )
        write(results)


if __name__ == "__main__":
    main()
