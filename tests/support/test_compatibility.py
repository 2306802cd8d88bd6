"""What the private parts of torch and accelerate do for us; a test that fails here names the one that has changed."""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tdkit.support.compatibility import (
    COMPILED,
    RecurrentWeights,
    buffers_of,
    constant_for_compile,
    convolve_its_own_way,
    convolves_its_own_way,
    exchange_paths,
    find_buffers_as_parameters,
    gathered_state,
    given_state_dict,
    has_experts_interface,
    holds_parameters,
    in_transform,
    is_jit_traced,
    is_sharded,
    move_own_tensors,
    offloads,
    onednn_enabled,
    onednn_has_linear,
    onednn_linear,
    only_calls_forward,
    own_parameters,
    parameters_of,
    parameters_on_meta,
    pre_hooks_of,
    rebind_hooked_forward,
    recurrent_weights_again,
    replace_forward,
    reset_accelerate_state,
    saved_buffers_of,
    shallow_copy,
    static_shape,
    storage_id,
    submodules_of,
    tensor_files_written_by,
    tree_leaves,
    tree_map,
    tree_map_only,
    uncompiled,
    unsharded_class,
    unwrapped,
    version_of,
    without_recurrent_weights,
    wrapper_tensor,
)


def test_a_shallow_copy_gets_parameters_of_its_own() -> None:
    layer = nn.Linear(2, 2)
    bias, weight = layer.bias, layer.weight
    twin = copy.copy(layer)
    assert parameters_of(twin) is parameters_of(layer)
    own_parameters(twin)
    parameters_of(twin)["weight"] = nn.Parameter(torch.zeros(2, 2))
    assert layer.weight is weight
    assert twin.bias is bias
    assert not twin.weight.any()


def test_a_module_s_own_tensors_move_without_its_submodules() -> None:
    outer = nn.ParameterDict({"own": nn.Parameter(torch.ones(2))})
    outer.add_module("inner", nn.Linear(2, 2))
    own = outer["own"]
    outer.register_buffer("count", torch.zeros(1))
    move_own_tensors(outer, torch.device("meta"))
    assert outer["own"] is own or outer["own"].is_meta
    assert outer.count.is_meta
    assert not outer.inner.weight.is_meta


@pytest.mark.parametrize("inference", [False, True])
def test_every_way_to_write_in_place_increases_the_version(inference: bool) -> None:
    tensor = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([tensor], lr=1.0)
    tensor.grad = torch.ones(3)
    seen = [version_of(tensor)]
    with torch.inference_mode(inference), torch.set_grad_enabled(False):
        for write in (
            lambda: tensor.mul_(2),
            lambda: tensor.copy_(torch.zeros(3)),
            lambda: tensor[0].fill_(3),
            lambda: tensor.detach().add_(1),
            optimizer.step,
        ):
            write()
            seen.append(version_of(tensor))
    assert seen == sorted(set(seen))


def test_an_inference_tensor_has_no_version() -> None:
    with torch.inference_mode():
        tensor = torch.ones(3)
    with pytest.raises(RuntimeError, match="Inference tensors do not track version counter"):
        version_of(tensor)


def test_writing_through_data_increases_no_version() -> None:
    tensor = nn.Parameter(torch.ones(3))
    before = version_of(tensor)
    tensor.data.mul_(2)
    assert version_of(tensor) == before


def test_the_dictionaries_of_a_module() -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.ones(3))
    module.register_parameter("bias", None)
    module.register_buffer("order", torch.arange(3))
    module.inner = nn.ParameterList([torch.ones(2), torch.zeros(2)])
    assert parameters_of(module) == {"weight": module.weight, "bias": None}
    assert buffers_of(module) == {"order": module.order}
    assert submodules_of(module) == {"inner": module.inner}
    assert [p is q for p, q in zip(parameters_of(module.inner).values(), module.inner, strict=True)] == [True, True]


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # of the other flags that it sets with this one
def test_the_switch_of_onednn_is_the_public_one() -> None:
    for enabled in (False, True):
        with torch.backends.mkldnn.flags(enabled=enabled):
            assert onednn_enabled() is enabled


@pytest.mark.skipif(not onednn_has_linear(), reason="this build of torch has no oneDNN")
@pytest.mark.parametrize("biased", [False, True])
def test_onednn_multiplies_as_torch_does(biased: bool) -> None:
    x, weight = torch.randn(2, 5, 7), torch.randn(3, 7)
    bias = torch.randn(3) if biased else None
    for matrix in (weight, weight.T.contiguous().T):
        torch.testing.assert_close(onednn_linear(x, matrix, bias), F.linear(x, weight, bias))


def test_the_usual_builds_of_torch_have_onednn() -> None:
    """On x86 and ARM, which all of the project's CPU figures are of."""
    assert onednn_has_linear() == torch.backends.mkldnn.is_available()


def test_a_constant_is_not_traced() -> None:
    calls = []

    @constant_for_compile
    def count(number: int) -> int:
        calls.append(number)  # a side effect that a trace would repeat in every call
        return number + 1

    @torch.compile(fullgraph=True, backend="eager")
    def run(x: Tensor) -> Tensor:
        return x * count(2)

    for _ in range(3):
        assert torch.equal(run(torch.ones(2)), torch.full((2,), 3.0))
    assert calls == [2]


def test_a_storage_is_known_by_its_number() -> None:
    one, other = torch.empty(0), torch.empty(0)
    assert storage_id(one) != storage_id(other)
    matrix = torch.ones(3, 4)
    assert storage_id(matrix) == storage_id(matrix.T[1:]) == storage_id(matrix.detach())
    assert storage_id(matrix) != storage_id(matrix.clone())


class Wrapper(Tensor):
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} was called")


def test_a_wrapper_has_metadata_and_computes_nothing_itself() -> None:
    wrapper = wrapper_tensor(Wrapper, (3, 4), dtype=torch.float16, device=torch.device("cpu"))
    assert type(wrapper) is Wrapper
    assert (wrapper.shape, wrapper.dtype, wrapper.device) == ((3, 4), torch.float16, torch.device("cpu"))
    assert not wrapper.requires_grad
    with pytest.raises(RuntimeError, match="invalid python storage"):
        wrapper.untyped_storage().data_ptr()
    with pytest.raises(AssertionError, match=r"aten\.add\.Tensor was called"):
        wrapper + 1


def test_transforms_of_functions_are_seen() -> None:
    seen = []

    def run(x: Tensor) -> Tensor:
        seen.append(in_transform())
        return x.sum()

    run(torch.ones(3))
    for transform in (torch.func.grad, torch.func.vmap, torch.func.jacrev):
        transform(run)(torch.ones(3))
    run(torch.ones(3))
    assert seen == [False, True, True, True, False]


def test_derivatives_in_forward_mode_are_seen() -> None:
    with torch.autograd.forward_ad.dual_level():
        assert in_transform()
    assert not in_transform()


def test_a_trace_is_seen_and_the_shapes_of_parameters_are_integers_in_it() -> None:
    class Seen(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((is_jit_traced(), static_shape(self.weight), isinstance(self.weight.shape[0], Tensor)))
            return super().forward(x) * x.shape[0]

    layer, seen = Seen(3, 2), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(layer, (torch.ones(4, 3),), check_trace=False)
    expected = layer(torch.ones(5, 3))
    assert seen == [(True, (2, 3), True), (False, (2, 3), False)]
    torch.testing.assert_close(traced(torch.ones(5, 3)), expected)


def test_what_keeps_lists_of_parameters_is_known() -> None:
    assert not holds_parameters(nn.Linear(2, 2))
    for name in ("DistributedDataParallel", "FSDPModule"):
        assert not holds_parameters(type(name, (nn.Linear,), {})(2, 2)), "a class of another library"
        kind = type("Wrapped", (type(name, (nn.Linear,), {"__module__": "torch.distributed"}),), {})
        assert holds_parameters(kind(2, 2))


def test_trees_are_taken_apart_and_mapped() -> None:
    tree = {"a": [1, (2.0, "x")], "b": None}
    assert tree_leaves(tree) == [1, 2.0, "x", None]
    assert tree_map(str, tree) == {"a": ["1", ("2.0", "x")], "b": "None"}
    assert tree_map_only(int, lambda n: n + 1, tree) == {"a": [2, (2.0, "x")], "b": None}


def test_accelerates_state_is_forgotten() -> None:
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, PartialState

    reset_accelerate_state(processes=True)
    try:
        assert accelerate.Accelerator(cpu=True, mixed_precision="bf16").mixed_precision == "bf16"
        reset_accelerate_state()
        assert not AcceleratorState._shared_state
        assert PartialState._shared_state
        assert accelerate.Accelerator(cpu=True, mixed_precision="no").mixed_precision == "no"
    finally:
        reset_accelerate_state(processes=True)
    assert not PartialState._shared_state


def test_layers_of_experts_are_told_by_the_forward_that_transformers_gives_their_class() -> None:
    from transformers import GptOssConfig, NemotronHConfig
    from transformers.integrations.moe import use_experts_implementation
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    layer = GptOssExperts(GptOssConfig(hidden_size=4, intermediate_size=3, num_local_experts=2))
    assert has_experts_interface(layer)
    assert (layer.has_gate, layer.has_bias, layer.is_transposed) == (True, True, True)
    assert layer._apply_gate(torch.zeros(5, 6)).shape == (5, 3)
    plain = NemotronHExperts(NemotronHConfig(hidden_size=4, moe_intermediate_size=3, n_routed_experts=2))
    assert (plain.has_gate, plain.has_bias, plain.is_transposed) == (False, False, False)
    assert plain.up_proj.shape == (2, 3, 4)
    assert not has_experts_interface(nn.Linear(2, 2))
    assert not has_experts_interface(type("Inherits", (GptOssExperts,), {})(GptOssConfig(hidden_size=4)))

    @use_experts_implementation
    class Own(nn.Module):
        def __init__(self, config: object) -> None:
            super().__init__()

        def forward(self, x: Tensor) -> Tensor:
            return x

    assert has_experts_interface(Own(None))
    replaced = Own(None)
    replaced.forward = lambda x: x  # type: ignore[method-assign]
    assert not has_experts_interface(replaced)


def test_a_forward_is_replaced_inside_the_hooks_of_accelerate() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    layer = nn.Linear(2, 2)
    x = torch.ones(1, 2)
    expected = layer(x)
    for hooked in (False, True):
        if hooked:
            hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(io_same_device=True))
        replace_forward(layer, lambda x: -x)
        assert torch.equal(layer(x), -x)
        replace_forward(layer, None)
        assert torch.equal(layer(x), expected)
    hooks.remove_hook_from_module(layer)
    assert torch.equal(layer(x), expected)


def test_a_convolution_calls_what_a_subclass_convolves_with() -> None:
    class Doubled(nn.Conv2d):
        def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:  # noqa: A002
            return super()._conv_forward(input, 2 * weight, bias)

    plain, doubled = nn.Conv2d(3, 4, 2, bias=False), Doubled(3, 4, 2, bias=False)
    doubled.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 5, 5)
    torch.testing.assert_close(doubled(x), 2 * plain(x))
    torch.testing.assert_close(convolve_its_own_way(doubled, x), doubled(x))
    assert convolves_its_own_way(Doubled)
    for layer in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
        assert not convolves_its_own_way(layer)
    assert not convolves_its_own_way(nn.Linear)


def test_the_hooks_before_forward_are_listed() -> None:
    layer = nn.Linear(2, 2)
    hook = lambda *_: None  # noqa: E731
    layer.register_forward_pre_hook(hook)
    assert pre_hooks_of(layer) == [hook]


def test_hooks_and_replaced_forwards_are_told() -> None:
    layer = nn.Linear(2, 2)
    assert only_calls_forward(layer)
    for register in (
        layer.register_forward_hook,
        layer.register_forward_pre_hook,
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
    ):
        hook = register(lambda *_: None)
        assert not only_calls_forward(layer)
        hook.remove()
    assert only_calls_forward(layer)
    layer.forward = lambda x: x  # as accelerate does
    assert not only_calls_forward(layer)


def test_a_shallow_copy_shares_tensors_and_not_their_lists() -> None:
    layer = nn.BatchNorm1d(3)
    layer.child = nn.Linear(2, 2)
    twin = shallow_copy(layer)
    assert type(twin) is nn.BatchNorm1d
    assert twin.weight is layer.weight
    assert twin.running_mean is layer.running_mean
    assert twin.child is layer.child
    del twin.weight, twin.running_mean, twin.child
    assert {"weight", "running_mean", "child"} <= {*layer._parameters, *layer._buffers, *layer._modules}


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_reads_its_weights_in_every_call(kind: type[nn.RNNBase]) -> None:
    layer, x = kind(3, 4), torch.randn(2, 1, 3)
    assert "_flat_weights" in vars(layer)
    expected = layer(x)[0]
    reads: list[str] = []

    class Reading(RecurrentWeights, kind):  # type: ignore[misc, valid-type]
        @property
        def weight_ih_l0(self) -> Tensor:
            reads.append("weight_ih_l0")
            return vars(self)["held"]  # type: ignore[no-any-return]

    twin = shallow_copy(layer)
    without_recurrent_weights(twin)
    vars(twin)["held"] = parameters_of(twin).pop("weight_ih_l0").detach() * 2
    twin.__class__ = Reading
    twin.double().float()
    twin.flatten_parameters()
    before = len(reads)
    copy.copy(twin)
    assert len(reads) == before  # a copy or a pickle reads no weight
    changed = twin(x)[0]
    assert len(reads) > before
    assert not changed.allclose(expected)
    del vars(twin)["held"]
    twin.__class__ = kind
    twin.register_parameter("weight_ih_l0", layer.weight_ih_l0)
    recurrent_weights_again(twin)
    torch.testing.assert_close(twin(x)[0], expected)
    assert torch.equal(layer(x)[0], expected)


def test_hooks_of_accelerate_are_known_and_call_the_class_again() -> None:
    hooks = pytest.importorskip("accelerate.hooks")

    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return super().forward(input) * 2

    layer, x = nn.Linear(2, 2), torch.ones(1, 2)
    assert not offloads(layer)
    expected = layer(x)
    hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(execution_device="cpu"))
    assert not offloads(layer)
    layer.__class__ = Doubled
    torch.testing.assert_close(layer(x), expected)
    rebind_hooked_forward(layer)
    torch.testing.assert_close(layer(x), expected * 2)
    hooks.remove_hook_from_module(layer)
    hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(execution_device="cpu", offload=True, weights_map={}))
    assert offloads(layer)


def test_the_wrapper_of_torch_compile_holds_the_module_under_a_prefix() -> None:
    layer = nn.Linear(2, 2)
    wrapper = torch.compile(layer, backend="eager")
    assert uncompiled(wrapper) is layer
    assert uncompiled(layer) is layer
    assert set(wrapper.state_dict()) == {f"{COMPILED}weight", f"{COMPILED}bias"}


def test_parameters_are_put_on_meta_as_modules_get_them_and_ties_stay() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.second = nn.Linear(3, 3)
            self.second.weight = self.first.weight
            self.bias = nn.Parameter(torch.zeros(3), requires_grad=False)
            self.register_parameter("none", None)
            self.register_buffer("table", torch.arange(3.0))

    with parameters_on_meta():
        model = Tied()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.second.weight is model.first.weight
    assert not model.bias.requires_grad
    assert model.none is None
    assert torch.equal(model.table, torch.arange(3.0))
    assert not nn.Linear(2, 2).weight.is_meta


def test_save_pretrained_hands_over_the_tensors_of_its_files(tmp_path: Path) -> None:
    from tests.conftest import make_gpt2

    model = make_gpt2().to("meta")
    written: dict[str, set[str]] = {}

    def write(tensors: dict[str, torch.Tensor], path: str, metadata: dict[str, str]) -> None:
        assert metadata == {"format": "pt"}
        assert all(tensor.is_meta for tensor in tensors.values())
        written[Path(path).name] = set(tensors)

    with tensor_files_written_by(write):
        model.save_pretrained(tmp_path, state_dict=model.state_dict(keep_vars=True), max_shard_size="100KB")
    names = set().union(*written.values())
    assert len(written) > 1
    assert names == set(dict(model.named_parameters()))  # ties once
    assert not list(tmp_path.glob("*.safetensors"))
    make_gpt2().save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").is_file()


def test_buffers_of_a_model_on_the_meta_device_are_saved(tmp_path: Path) -> None:
    from tests.conftest import make_gpt2

    model = make_gpt2()
    model.transformer.h[0].register_buffer("order", torch.arange(3))
    model.to("meta")
    written: set[str] = set()
    find_buffers_as_parameters(model)
    assert model.get_parameter("transformer.h.0.order") is model.transformer.h[0].order
    assert model.get_parameter("lm_head.weight") is model.lm_head.weight
    with tensor_files_written_by(lambda tensors, path, metadata: written.update(tensors)):
        model.save_pretrained(tmp_path, state_dict=model.state_dict(keep_vars=True))
    assert written == {*dict(model.named_parameters()), "transformer.h.0.order"}


def test_wrappers_are_taken_off() -> None:
    layer = nn.Linear(2, 2)
    assert unwrapped(layer) is layer
    assert unwrapped(nn.DataParallel(layer)) is layer
    assert unwrapped(nn.DataParallel(torch.compile(layer, backend="eager"))) is layer  # type: ignore[arg-type]

    class DistributedDataParallel(nn.Module):  # of the same name, and no wrapper
        pass

    other = DistributedDataParallel()
    assert unwrapped(other) is other


def test_the_class_and_the_tensors_of_a_sharded_model(tmp_path: Path) -> None:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        layer = nn.Linear(2, 3)
        weight = layer.weight.detach().clone()
        assert unsharded_class(type(layer)) is nn.Linear
        assert not is_sharded(layer)
        fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
        assert type(layer) is not nn.Linear
        assert unsharded_class(type(layer)) is nn.Linear
        assert is_sharded(layer)
        assert torch.equal(gathered_state(layer)["weight"], weight)
    finally:
        distributed.destroy_process_group()


def test_the_state_that_save_pretrained_is_given_is_seen() -> None:
    def hook() -> Any:
        return given_state_dict()

    def save_pretrained(state_dict: Any) -> Any:
        return hook()

    def other(state_dict: Any) -> Any:
        return hook()

    assert save_pretrained({"a": 1}) == {"a": 1}
    assert save_pretrained(None) is None
    assert other({"a": 1}) is None


def test_paths_are_exchanged_in_one_step(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    (first / "x").write_text("1")
    second.mkdir()
    assert exchange_paths(first, second) == (sys.platform in ("linux", "darwin"))
    assert (second / "x").exists() == (sys.platform in ("linux", "darwin"))
    assert not exchange_paths(first, tmp_path / "missing")


def test_buffers_that_a_state_dict_holds() -> None:
    module = nn.Module()
    module.register_buffer("kept", torch.ones(2))
    module.register_buffer("left_out", torch.ones(3), persistent=False)
    module.register_buffer("absent", None)
    assert [id(buffer) for buffer in saved_buffers_of(module)] == [id(module.kept)]
    assert list(module.state_dict()) == ["kept"]
