"""Calibration: the moments against their definition, and a model that comes back as it was."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import tdkit
from tdkit import LowRank, Metric, Policy, Rule
from tdkit.calibration.calibration import Calibration
from tdkit.calibration.measure import calibrate
from tdkit.calibration.runner import Runner
from tdkit.errors import CalibrationError, OptionError, SourceError
from tests.conftest import make_gpt2


class Attention(nn.Module):
    """Two layers that share an input, a third that does not, and a nonlinearity that writes in place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, 3)
        self.o = nn.Linear(width + 3, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.o(F.relu(torch.cat([self.q(x), self.k(x)], -1), inplace=True))


class Language(nn.Module):
    """A language model with a tied head, dropout and an unused layer."""

    def __init__(self, vocabulary: int = 11, width: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Attention(width) for _ in range(2))
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight
        self.spare = nn.Linear(4, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.drop(x))
        return logits


@pytest.fixture
def model() -> Language:
    torch.manual_seed(0)
    return Language()


@pytest.fixture
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(11, (2, 7), generator=generator) for _ in range(3)]


def direct(model: nn.Module, batches: list[Tensor], name: str) -> tuple[Tensor, Tensor]:
    """E[x x^T] and E[g g^T] of a layer, straight from their definition."""
    model = model.eval()
    xs: list[Tensor] = []
    ys: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        output.retain_grad()
        xs.append(args[0].detach().clone())
        ys.append(output)

    handle = model.get_submodule(name).register_forward_hook(keep)
    for ids in batches:
        logits = model(ids)
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    handle.remove()
    x = torch.cat([x.flatten(0, 1) for x in xs]).double()
    g = torch.cat([y.grad.flatten(0, 1) for y in ys if y.grad is not None]).double()
    return x.T @ x / len(x) if x.ndim == 2 else x, g.T @ g / len(g)


@pytest.mark.parametrize("name", ["blocks.0.q", "blocks.0.k", "blocks.0.o", "blocks.1.q", "blocks.1.o"])
def test_moments_are_what_they_say(model: Language, batches: list[Tensor], name: str) -> None:
    inner, outer = direct(model, batches, name)
    metric = calibrate(model, batches).metric(name)
    assert metric is not None
    assert metric.input is not None
    assert metric.output is not None
    assert metric.input.dtype == metric.output.dtype == torch.float64
    torch.testing.assert_close(metric.input, inner, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(metric.output, outer, rtol=1e-5, atol=1e-8)


def test_an_embedding_counts_tokens(batches: list[Tensor]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 11))
    metric = calibrate(model, batches).metric("0")
    assert metric is not None
    assert metric.input is not None
    assert metric.output is not None
    ids = torch.cat(batches).flatten()
    torch.testing.assert_close(metric.output, torch.bincount(ids, minlength=11).double() / len(ids))
    torch.testing.assert_close(metric.input, direct(model, batches, "0")[1], rtol=1e-5, atol=1e-8)


def test_a_tied_head_adds_its_share(model: Language, batches: list[Tensor]) -> None:
    metric = calibrate(model, batches).metric("embed")
    assert metric is not None
    assert metric.input is not None
    assert metric.output is not None
    ids = torch.cat(batches).flatten()
    counts = torch.bincount(ids, minlength=11).double() / len(ids)
    _, gradients = direct(model, batches, "embed")
    inner, outer = direct(model, batches, "head")
    both = float(gradients.trace() * counts.sum() + inner.trace() * outer.trace())
    trace = float(metric.input.trace() * metric.output.trace())
    assert trace == pytest.approx(both, rel=1e-5)
    expected = torch.diag(counts) * gradients.trace() + outer * inner.trace()
    torch.testing.assert_close(metric.output, expected, rtol=1e-5, atol=1e-8)


def test_a_layer_that_is_not_reached_has_no_metric(model: Language, batches: list[Tensor]) -> None:
    calibration = calibrate(model, batches)
    assert calibration.metric("spare") is None
    assert "spare" not in calibration.names


def test_the_model_comes_back_as_it_was(model: Language, batches: list[Tensor]) -> None:
    model.train()
    model.blocks[0].eval()
    model.embed.weight.requires_grad_(False)
    model.blocks[1].get_submodule("q").weight.grad = torch.ones(6, 6)
    modes = {name: m.training for name, m in model.named_modules()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    switches = {name: p.requires_grad for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    calibrate(model, batches)
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == switches
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        if name == "blocks.1.q.weight":
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, torch.ones(6, 6))
        else:
            assert parameter.grad is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_hooks_and_modes_are_restored_after_an_error(model: Language, batches: list[Tensor]) -> None:
    model.train()
    with pytest.raises(IndexError):
        calibrate(model, [*batches, torch.full((1, 4), 99)])
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("gradients", [True, False])
def test_groups_within_a_limit_measure_the_same(model: Language, batches: list[Tensor], gradients: bool) -> None:
    whole = calibrate(model, batches, gradients=gradients)
    cut = calibrate(model, iter(batches), gradients=gradients, limit_bytes=1000)
    assert cut.names == whole.names
    for name in whole.names:
        same_metric(whole, cut, name)


def test_moments_that_alone_exceed_the_limit_are_told_first(
    model: Language, batches: list[Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    calibrate(model, batches)
    assert not caplog.records
    calibrate(model, batches, limit_bytes=100)
    assert "the moments of blocks.0.q alone take 0.0 GB, more than limit_bytes=0.0 GB" in caplog.text


def same_metric(one: Calibration, other: Calibration, name: str) -> None:
    first, second = one.metric(name), other.metric(name)
    assert first is not None
    assert second is not None
    for a, b in ((first.input, second.input), (first.output, second.output)):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b)


def test_layers_that_share_an_input_share_the_moment(model: Language, batches: list[Tensor]) -> None:
    calibration = calibrate(model, batches, gradients=False)
    q, k = calibration.metric("blocks.0.q"), calibration.metric("blocks.0.k")
    assert q is not None
    assert k is not None
    assert q.output is None
    assert q.input is k.input


class Fickle(nn.Module):
    """Two layers that share their input on the first call only."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.a(x) + self.b(x if self.calls == 1 else 2 * x)
        return y


def test_sharing_that_breaks_is_noticed() -> None:
    torch.manual_seed(0)
    model = Fickle()
    calibration = calibrate(model, [torch.randn(5, 4) for _ in range(3)], gradients=False)
    a, b = calibration.metric("a"), calibration.metric("b")
    assert a is not None
    assert a.input is not None
    assert b is not None
    assert b.input is not None
    torch.testing.assert_close(b.input, 4 * a.input)


def test_padding_is_left_out(model: Language, batches: list[Tensor]) -> None:
    ids = batches[0]
    padded = {"input_ids": F.pad(ids, (0, 3), value=5), "attention_mask": F.pad(torch.ones_like(ids), (0, 3))}
    for name in ("blocks.0.q", "embed"):
        same_metric(calibrate(model, [ids]), calibrate(model, [padded]), name)


def test_any_model_and_loss() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    pairs = [(torch.randn(8, 5), torch.randint(2, (8,))) for _ in range(2)]
    found = calibrate(
        model,
        [{"input": x} for x, _ in pairs],
        loss=lambda output, batch: F.cross_entropy(output, torch.ones(8, dtype=torch.long), reduction="sum"),
    )
    assert found.names == ("0", "2")
    x = torch.cat([x for x, _ in pairs]).double()
    metric = found.metric("0")
    assert metric is not None
    assert metric.input is not None
    torch.testing.assert_close(metric.input, x.T @ x / 16, rtol=1e-5, atol=1e-7)


def test_save_and_load(model: Language, batches: list[Tensor], tmp_path: Path) -> None:
    measured = calibrate(model, batches)
    measured.save(tmp_path / "c")
    loaded = Calibration.load(tmp_path / "c")
    assert loaded.names == measured.names
    assert loaded.gradients
    for name in measured.names:
        same_metric(measured, loaded, name)
    assert loaded.batches is not None
    assert all(torch.equal(a, b) for a, b in zip(loaded.batches, batches, strict=True))
    with pytest.raises(CalibrationError, match="exists: give a new folder"):
        measured.save(tmp_path / "c")
    measured.save(tmp_path / "c", overwrite=True)
    for file in sorted((tmp_path / "c").glob("moments-*"))[:1]:
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CalibrationError, match="not the file that was saved"):
        for name in measured.names:
            Calibration.load(tmp_path / "c").metric(name)
    file.unlink()
    with pytest.raises(CalibrationError, match="incomplete"):
        Calibration.load(tmp_path / "c")
    shutil.rmtree(tmp_path / "c")
    with pytest.raises(CalibrationError, match="no saved calibration"):
        Calibration.load(tmp_path / "c")


def test_faults_are_told(model: Language, batches: list[Tensor]) -> None:
    with pytest.raises(CalibrationError, match="there are no calibration batches"):
        calibrate(model, [])
    with pytest.raises(CalibrationError, match="no causal language model"):
        calibrate(nn.Sequential(nn.Linear(4, 4)), [torch.randn(3, 4)])
    with pytest.raises(CalibrationError, match="batch 0 is nan: it must be one finite number"):
        calibrate(model, batches, loss=lambda output, batch: output.sum() * float("nan"))
    with pytest.raises(CalibrationError, match="does not depend on any layer"):
        calibrate(model, batches, loss=lambda output, batch: torch.zeros(()))
    with pytest.raises(CalibrationError, match="no layer that can be rewritten"):
        calibrate(nn.Sequential(nn.Tanh()), [torch.randn(3, 4)])


def test_a_text_by_name(tmp_path: Path) -> None:
    class Letters:
        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [ord(c) % 11 for c in text]}

    path = tmp_path / "text.txt"
    path.write_text("some words that are long enough for a few windows of text " * 20, encoding="utf-8")
    calibration = calibrate(Language(), path, tokenizer=Letters(), context=16, tokens=160)
    assert calibration.batches is not None
    assert [tuple(b.shape) for b in calibration.batches] == [(1, 16)] * 10


def test_the_model_goes_to_the_device_asked_for(batches: list[Tensor]) -> None:
    class Noting(Language):
        def to(self, device: Any) -> Any:  # type: ignore[override]
            places.append(torch.device(device))
            return super().to(device)

    places: list[torch.device] = []
    calibrate(Noting(), batches)
    assert places == []
    calibrate(Noting(), batches, device="cpu:0")  # the CPU by another name
    assert places[0] == torch.device("cpu:0")


def test_batches_go_to_the_device_of_the_model(batches: list[Tensor]) -> None:
    class Echo(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002, its name in torch
            return input

    runner = Runner(Echo(2, 2, device="meta"), gradients=False)
    for batch in (batches[0], (batches[0],), {"input": batches[0]}):
        assert runner.forward(batch).is_meta


def test_it_is_exported() -> None:
    assert tdkit.calibrate is calibrate


def test_names_that_no_layer_has_are_told_with_the_nearest() -> None:
    model = Language()
    with pytest.raises(CalibrationError, match=r"is called 'hed'; did you mean 'head'\?"):
        calibrate(model, [torch.zeros(1, 4, dtype=torch.long)], names=["hed", "embed"])
    with pytest.raises(CalibrationError, match="names='embed' must be a list"):
        calibrate(model, [torch.zeros(1, 4, dtype=torch.long)], names="embed")


def test_a_layer_called_with_its_input_by_keyword_is_calibrated() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(input=x)  # type: ignore[no-any-return]

    model, x = Keyword(), torch.randn(10, 4)
    metric = calibrate(model, [x], loss=lambda y, _: y.sum()).metric("layer")
    assert metric is not None
    assert metric.input is not None
    torch.testing.assert_close(metric.input, (x.T @ x / 10).double(), rtol=1e-5, atol=1e-6)
    tdkit.compress(model, tdkit.Policy([tdkit.Rule("layer", tdkit.LowRank(rank=1))]))
    assert model(x).shape == (10, 3)


@pytest.mark.parametrize("where", ["input", "gradient"])
def test_moments_that_overflow_are_told_with_the_layer(where: str) -> None:
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.randn(5, 4)
    if where == "input":
        x[0, 0] = float("inf")
        with pytest.raises(CalibrationError, match="0: the second moment of its inputs is NaN or infinite"):
            calibrate(model, [x], gradients=False)
        return
    with pytest.raises(CalibrationError, match="0: the second moment of its output gradients is NaN or infinite"):
        calibrate(model, [x], loss=lambda y, _: (y * 1e30).sum())


def test_a_model_on_meta_is_told_before_it_runs() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(CalibrationError, match=r"0\.weight is on the meta device and holds no numbers: load the model"):
        calibrate(model, [torch.randn(2, 4)])


@pytest.mark.parametrize("device", [None, "cpu"])
def test_layers_beside_offloaded_ones_are_measured(device: str | None) -> None:
    from accelerate import cpu_offload

    model, x = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.randn(9, 4)
    expected = calibrate(model, [x], loss=lambda y, _: y.square().sum()).metric("0")
    cpu_offload(model[1], execution_device="cpu")
    assert model[1].weight.is_meta
    found = calibrate(model, [x], loss=lambda y, _: y.square().sum(), device=device)
    metric = found.metric("0")
    assert found.names == ("0",)
    assert metric is not None
    assert expected is not None
    for ours, theirs in ((metric.input, expected.input), (metric.output, expected.output)):
        assert ours is not None
        assert theirs is not None
        torch.testing.assert_close(ours, theirs)


def test_a_model_made_in_inference_mode_is_told_or_measured_without_gradients() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(CalibrationError, match=r"0\.weight was made under torch\.inference_mode\(\)"):
        calibrate(model, [torch.randn(2, 4)], loss=lambda y, _: y.sum())
    x = torch.randn(9, 4)
    metric = calibrate(model, [x], gradients=False).metric("0")
    assert metric is not None
    assert metric.input is not None
    torch.testing.assert_close(metric.input, (x.T @ x / 9).double(), rtol=1e-5, atol=1e-6)


def test_calibration_inside_inference_mode_is_that_outside() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(9, 4)
    outside = calibrate(model, [x], loss=lambda y, _: y.square().sum()).metric("0")
    with torch.inference_mode():
        inside = calibrate(model, [x], loss=lambda y, _: y.square().sum()).metric("0")
    assert outside is not None
    assert inside is not None
    assert outside.output is not None
    assert inside.output is not None
    assert torch.equal(outside.output, inside.output)


def test_batches_made_in_inference_mode_are_ordinary_batches() -> None:
    model = nn.Sequential(Attention(6), Attention(6))
    with torch.inference_mode():
        batch = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    found = calibrate(model, [batch], loss=lambda y, _: y.square().sum())
    expected = calibrate(model, [batch.clone()], loss=lambda y, _: y.square().sum())
    for name in expected.names:
        for ours, theirs in zip(*(vars(each.metric(name)).values() for each in (found, expected)), strict=True):
            assert torch.equal(ours, theirs)


def test_a_device_that_is_not_there_and_windows_that_are_too_long_are_told_before_the_model_runs() -> None:
    model = make_gpt2()
    ids = torch.randint(60, (1, 33))
    with pytest.raises(OptionError, match="device='meta' holds no numbers"):
        calibrate(model, [ids[:, :8]], device="meta")
    with pytest.raises(SourceError, match=r"a window of 33 tokens is longer than the 32 positions of GPT2LMHeadModel"):
        calibrate(model, [ids[:, :8], ids])
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_a_calibration_holds_metrics_only() -> None:
    with pytest.raises(CalibrationError, match="the metric of 'a' is a NoneType"):
        Calibration({"a": None})  # type: ignore[dict-item]


def changed(folder: Path, **entries: Any) -> None:
    path = folder / "calibration.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_a_saved_calibration_is_confined_and_checked(model: Language, batches: list[Tensor], tmp_path: Path) -> None:
    measured, folder = calibrate(model, batches), tmp_path / "c"
    for entries, message in (
        ({"format": "other"}, "is no description of a calibration"),
        ({"version": 99}, "format version 99"),
        ({"version": True}, "format version True"),
        ({"files": {"../secret.safetensors": ["up"]}}, "files are named by paths"),
        ({"digests": {}}, "is not the file that was saved"),
        ({"rows": {"up": -1}}, "rows are no counts"),
    ):
        measured.save(folder, overwrite=True)
        changed(folder, **entries)
        with pytest.raises(CalibrationError, match=message):
            Calibration.load(folder)
        changed(folder, format="tdkit-calibration")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_moments_that_are_not_finite_are_told_when_they_are_read(
    value: float, model: Language, batches: list[Tensor], tmp_path: Path
) -> None:
    folder = calibrate(model, batches).save(tmp_path / "c")
    path = folder / "moments-00000.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[1] = value  # beside the diagonal
    save_file(tensors, path)
    changed(folder, version=1)  # which has no digests
    loaded = Calibration.load(folder)
    with pytest.raises(CalibrationError, match="hold NaN or infinite values"):
        for name in loaded.names:
            loaded.metric(name)


def test_moments_of_another_model_are_told(tied: Any, ids: Tensor) -> None:
    wrong = Calibration({"up": Metric(torch.eye(5).double())}, gradients=False)
    with pytest.raises(CalibrationError, match="up: the moments of its inputs are 5x5, and its weight is 48x24"):
        tdkit.compress(tied, Policy([Rule("up", LowRank(rank=2))]), calibration=wrong)


@pytest.mark.parametrize("version", [1, 2])
def test_a_calibration_of_every_format_loads(version: int) -> None:
    folder = Path(__file__).parents[1] / "models" / "golden" / f"calibration-{version}"
    loaded = Calibration.load(folder)
    assert json.loads((folder / "calibration.json").read_text())["version"] == version
    assert set(loaded.names) == {"embed", "up", "down"}
    assert loaded.batches is not None
    for name in loaded.names:
        metric = loaded.metric(name)
        assert metric is not None
        assert metric.input is not None


@pytest.mark.parametrize(("scale", "gradients"), [(1e25, True), (1e25, False), (math.inf, True)])
def test_activations_that_overflow_are_named_with_their_layer(scale: float, gradients: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.fill_(scale)
    with pytest.raises(
        CalibrationError, match=r"\b1( is the first layer whose inputs|: the second moment of its inputs)"
    ):
        calibrate(model, [torch.ones(3, 4)], gradients=gradients, loss=lambda y, _: y.sum())


def test_fits_shrink_moments_towards_what_is_known_before_any_row() -> None:
    torch.manual_seed(0)
    model, few, many = nn.Sequential(nn.Linear(8, 4)), torch.randn(40, 8), torch.randn(4000, 8)
    for x, share in ((few, 0.25 * 8 / 40), (many, 0.25 * 8 / 4000)):
        calibration = calibrate(model, [x], loss=lambda y, _: y.square().sum())
        raw, used = calibration.metric("0"), calibration.fit_metric("0")
        assert raw is not None
        assert used is not None
        assert raw.input is not None
        expected = raw.input + share * raw.input.diagonal().diag()
        torch.testing.assert_close(used.input, expected)
        assert raw.output is not None
        mean = raw.output.diagonal().mean()
        torch.testing.assert_close(used.output, 0.9 * raw.output + 0.1 * mean * torch.eye(4, dtype=torch.float64))
        torch.testing.assert_close(raw.input, x.T @ x / len(x), check_dtype=False)
    calibration.units = 0  # not known
    assert calibration.fit_metric("0") is raw


def test_a_weight_goes_by_the_name_of_its_layer() -> None:
    torch.manual_seed(0)
    measured = tdkit.calibrate(nn.Sequential(nn.Linear(4, 3)), [torch.randn(8, 4)], gradients=False)
    assert measured.metric("0") is not None
    assert measured.metric("1") is None
    with pytest.raises(CalibrationError, match=r"no moments are called '0.weight': those .* are '0'"):
        measured.metric("0.weight")
