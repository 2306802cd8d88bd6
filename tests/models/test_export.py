"""torch.export, ONNX, torch.jit.trace and torch.compile of compressed models: right for sizes not of the example."""

from __future__ import annotations

import collections
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import export

import tdkit
from tdkit import LowRank, Policy, Rule
from tdkit.models.hosts.linear import FactorizedLinear
from tests.models.exporting import CASES, compressed, every

# not of tdkit: what is deprecated in torch and transformers, sizes that transformers reads in a trace
pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning:(?!tdkit)"),
    pytest.mark.filterwarnings("ignore:`torch.jit.* is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*were assigned during export:UserWarning"),
    pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
]

EXPORTED = [*every("gpt2", "images"), ("llama", "tt_matrix"), ("vit", "kronecker"), ("experts", "low_rank")]
TRACED = [*every("gpt2", "images", "sequences"), ("experts", "kronecker"), ("experts", "low_rank")]
COMPILED = [("images", "cp"), ("gpt2", "tt_matrix")]


def inputs(name: str) -> tuple[Tensor, Tensor]:
    return CASES[name][1]()


@pytest.mark.parametrize(("name", "kind"), EXPORTED)
def test_an_exported_program_computes_other_sizes(name: str, kind: str) -> None:
    model, (example, other) = compressed(name, kind), inputs(name)
    with torch.no_grad():
        program = export(model, (example,), dynamic_shapes=(CASES[name][2],), strict=False).module()
        torch.testing.assert_close(program(other), model(other))


@pytest.mark.parametrize(
    ("strict", "gradients", "prefer"), [(False, False, "speed"), (False, True, "memory"), (True, True, "speed")]
)
def test_every_way_to_export_computes_other_sizes(strict: bool, gradients: bool, prefer: Any) -> None:
    model, (example, other) = tdkit.prepare(compressed("gpt2", "tt_matrix"), prefer=prefer), inputs("gpt2")
    with torch.no_grad():
        expected = model(other), model(example)  # caches where it may
    with torch.set_grad_enabled(gradients):
        program = export(model, (example,), dynamic_shapes=(CASES["gpt2"][2],), strict=strict)
    own = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("tdkit" in target or "autograd" in target for target in own)
    torch.testing.assert_close(program.module()(other), expected[0])
    held = sum(tensor.numel() for tensor in {t.data_ptr(): t for t in program.state_dict.values()}.values())
    assert held == sum(p.numel() for p in model.parameters()) + sum(b.numel() for b in model.buffers())


def test_a_low_rank_layer_is_two_products_in_an_exported_program() -> None:
    layer = tdkit.compress(nn.Sequential(nn.Linear(24, 16)), Policy([Rule("*", LowRank(rank=4))], allow_growth=True))
    program = export(layer, (torch.randn(2, 7, 24),), dynamic_shapes=(CASES["gpt2"][2],)).run_decompositions()
    found = collections.Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")
    assert found["aten.mm.default"] + found["aten.addmm.default"] == 2


@pytest.mark.parametrize(("name", "kind"), TRACED)
def test_a_traced_model_computes_other_sizes(name: str, kind: str, tmp_path: Path) -> None:
    model, (example, other) = compressed(name, kind), inputs(name)
    with torch.no_grad():
        traced = torch.jit.trace(model, (example,), check_trace=False)
        torch.jit.save(traced, tmp_path / "traced.pt")
        torch.testing.assert_close(torch.jit.load(tmp_path / "traced.pt")(other), model(other))


def test_a_trace_of_one_row_serves_more(tmp_path: Path) -> None:
    for kind in (tdkit.Kronecker(terms=2), tdkit.TTMatrix(ranks=3), LowRank(rank=3)):
        layer = FactorizedLinear(kind.fit(torch.randn(24, 20)), nn.Parameter(torch.randn(24))).eval()
        x = torch.randn(5, 20)
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                torch.testing.assert_close(torch.jit.trace(layer, (x[:1],))(x), layer(x))


def test_a_trace_of_a_prepared_model_holds_the_factors() -> None:
    layer = tdkit.prepare(FactorizedLinear(tdkit.TTMatrix(ranks=16).fit(torch.randn(64, 64)), None))
    x = torch.randn(512, 64)
    with torch.no_grad():
        layer(x)
        traced = torch.jit.trace(layer, (x,))
        before = traced(x)
        for core in layer.matrix.factors():
            core.mul_(2)
        torch.testing.assert_close(traced(x), 8 * before)


@pytest.mark.parametrize(("name", "kind"), COMPILED)
def test_a_model_compiles_whole(name: str, kind: str) -> None:
    model, (example, other) = compressed(name, kind), inputs(name)
    torch.compiler.reset()
    with torch.no_grad():
        program = torch.compile(model, fullgraph=True, backend="aot_eager")
        for x in (example, other):
            torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)


onnx = pytest.mark.skipif(
    any(not __import__("importlib.util").util.find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript")),
    reason="pip install onnx onnxruntime onnxscript",
)


def run_onnx(file: Path, x: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def operators(file: Path) -> collections.Counter[str]:
    import onnx as package

    model = package.load(file)
    assert {each.domain for each in model.opset_import} <= {"", "ai.onnx"}
    assert not model.functions
    return collections.Counter(node.op_type for node in model.graph.node)


def to_onnx(name: str, model: nn.Module, file: Path) -> Tensor:
    """Write a file with an example of one size; returns an input of another size."""
    example, other = inputs(name)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own use of what torch deprecates
        torch.onnx.export(model, (example,), file, dynamic_shapes=(CASES[name][2],), dynamo=True, verbose=False)
    return other


@onnx
@pytest.mark.parametrize(
    ("name", "kind"),
    [("images", "tucker"), ("images", "kronecker")],
)
def test_onnxruntime_computes_the_same(name: str, kind: str, tmp_path: Path) -> None:
    model = compressed(name, kind)
    other = to_onnx(name, model, tmp_path / "model.onnx")
    operators(tmp_path / "model.onnx")
    with torch.no_grad():
        torch.testing.assert_close(run_onnx(tmp_path / "model.onnx", other), model(other), rtol=1e-4, atol=1e-4)


@onnx
@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), every("gpt2", "llama", "images", "vit", "experts"))
def test_onnxruntime_computes_the_same_for_all(name: str, kind: str, tmp_path: Path) -> None:
    test_onnxruntime_computes_the_same(name, kind, tmp_path)


@onnx
def test_a_low_rank_layer_is_two_products_in_onnx(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 24, bias=False))
    tdkit.compress(model, Policy([Rule("*", LowRank(rank=4))], allow_growth=True), progress=False)
    x = torch.randn(3, 5, 24)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shapes = (CASES["gpt2"][2],)
        torch.onnx.export(model, (x,), tmp_path / "m.onnx", dynamic_shapes=shapes, dynamo=True, verbose=False)
    found = operators(tmp_path / "m.onnx")
    assert found["MatMul"] + found["Gemm"] == 4
    assert set(found) <= {"MatMul", "Gemm", "Relu", "Reshape", "Shape", "Concat", "Add", "Gather", "Unsqueeze", "Slice"}


@onnx
@pytest.mark.parametrize("kind", [kind for _, kind in every("sequences")])
def test_recurrent_layers_stay_whole_in_onnx(kind: str, tmp_path: Path) -> None:
    """By the exporter of TorchScript: torch.export writes out the steps of a recurrent layer, for one length."""
    model, (example, other) = compressed("sequences", kind), inputs("sequences")
    axes = {"x": {0: "batch", 1: "length"}, "y": {0: "batch", 1: "length"}}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names: dict[str, Any] = {"input_names": ["x"], "output_names": ["y"], "dynamic_axes": axes}
        torch.onnx.export(model, (example,), tmp_path / "model.onnx", dynamo=False, **names)
        assert operators(tmp_path / "model.onnx")["LSTM"] == 2
        torch.testing.assert_close(run_onnx(tmp_path / "model.onnx", other), model(other), rtol=1e-4, atol=1e-4)


def test_torch_itself_exports_a_recurrent_layer_for_one_length() -> None:
    """What the documentation says of torch; when it fails, the exporter above is no longer needed."""
    refused = torch._dynamo.exc.UserError, ValueError  # of torch 2.8, about the list of its weights
    with pytest.raises(refused, match=r"length|_flat_weights\[0\].* were assigned during export"):
        export(nn.LSTM(4, 5, batch_first=True), (torch.randn(2, 3, 4),), dynamic_shapes=(CASES["gpt2"][2],))
