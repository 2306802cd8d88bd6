"""OpenVINO runs compressed models: from an exported program or, of recurrent layers, from a trace.

Skipped where it is not installed: ``pip install openvino``.
"""

from __future__ import annotations

import pytest
import torch

from tests.models.exporting import CASES, compressed

openvino = pytest.importorskip("openvino")

pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),  # in its reader
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning:(?!tdkit)"),
    pytest.mark.filterwarnings("ignore:`torch.jit.* is deprecated:DeprecationWarning"),
]


@pytest.mark.parametrize(
    ("name", "kind", "operators"),
    [
        ("gpt2", "tt_matrix", {"MatMul"}),
        ("images", "tucker", {"Convolution"}),
        ("sequences", "low_rank", {"LSTMSequence", "GRUSequence"}),
    ],
)
def test_it_computes_the_same_for_other_sizes(name: str, kind: str, operators: set[str]) -> None:
    model, (example, other) = compressed(name, kind), CASES[name][1]()
    with torch.no_grad():
        if name == "sequences":
            traced = torch.jit.trace(model, (example,), check_trace=False)
            converted = openvino.convert_model(traced, example_input=example)
        else:
            program = torch.export.export(model, (example,), dynamic_shapes=(CASES[name][2],))
            converted = openvino.convert_model(program)
        assert operators <= {operator.get_type_name() for operator in converted.get_ops()}
        compiled = openvino.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        found = torch.from_numpy(compiled(other.numpy())[0].copy())
        torch.testing.assert_close(found, model(other), rtol=1e-4, atol=1e-4)
