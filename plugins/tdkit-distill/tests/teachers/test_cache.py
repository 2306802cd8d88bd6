"""The offline teacher: equal to the live one, finished when it was interrupted, verified when it is read."""

from __future__ import annotations

import gc
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_models import bert, gpt2, ids, same_weights
from launch import started

from tdkit_distill import build_cache, distill
from tdkit_distill.data.examples import Table, Windows
from tdkit_distill.data.masked import MaskedWindows, MaskTokens
from tdkit_distill.errors import CacheError, StorageError
from tdkit_distill.models.view import TopLogits
from tdkit_distill.teachers import cache as cache_module
from tdkit_distill.teachers.cache import CachedTeacher, rows_kept

STAGE = {"losses": {"logits": {"temperature": 2.0}}, "steps": 6, "batch_size": 4}


def test_training_from_a_whole_cache_is_training_with_the_live_teacher(tmp_path: Path) -> None:
    teacher, windows = gpt2(), Windows(ids())
    live, cached = gpt2(1, seed=1), gpt2(1, seed=1)
    distill(live, teacher, STAGE, windows)
    distill(cached, build_cache(teacher, windows, tmp_path, k=48, temperature=2.0, rows_per_shard=5), STAGE, windows)
    assert same_weights(live, cached)
    assert not same_weights(live, gpt2(1, seed=1))


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_training_from_the_largest_logits_is_top_k_with_the_live_teacher(tmp_path: Path, kind: str) -> None:
    teacher, windows = gpt2(), Windows(ids())
    cache = build_cache(teacher, windows, tmp_path, k=5, temperature=2.0)
    losses = []
    for source in (teacher, cache):
        stage = {**STAGE, "losses": {"logits": {"kind": kind, "temperature": 2.0, "top_k": 5}}}
        losses.append([e["loss"] for e in distill(gpt2(1, seed=1), source, stage, windows).history])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_an_interrupted_cache_computes_only_what_is_missing(tmp_path: Path) -> None:
    teacher, windows = gpt2(), Windows(ids())
    whole = build_cache(teacher, windows, tmp_path / "whole", k=5, rows_per_shard=5)
    rows: list[int] = []

    class StoppedError(Exception):
        pass

    def call(model: Any, batch: Any) -> Any:
        rows.append(len(batch["input_ids"]))
        if sum(rows) > 12:
            raise StoppedError
        return model(batch["input_ids"])

    with pytest.raises(StoppedError):
        build_cache(teacher, windows, tmp_path / "part", k=5, rows_per_shard=5, batch=5, call=call)
    with pytest.raises(CacheError, match="holds 2 of 5 shards: build the cache again to finish it"):
        CachedTeacher(tmp_path / "part")
    assert [rows_kept(tmp_path / name) for name in ("whole", "part", "none")] == [24, 10, 0]
    rows.clear()

    def count(model: Any, batch: Any) -> Any:
        rows.append(len(batch["input_ids"]))
        return model(batch["input_ids"])

    finished = build_cache(teacher, windows, tmp_path / "part", k=5, rows_per_shard=5, batch=5, call=count)
    assert sum(rows) == 24 - 10
    every = torch.arange(24)
    one, other = (c.view({"x": every}, every).logits for c in (whole, finished))
    assert isinstance(one, TopLogits)
    assert isinstance(other, TopLogits)
    assert torch.equal(one.values, other.values)
    assert torch.equal(one.indices, other.indices)


def test_damage_is_found_when_it_is_read(tmp_path: Path) -> None:
    teacher, windows = gpt2(), Windows(ids())
    build_cache(teacher, windows, tmp_path, k=5, temperature=2.0, rows_per_shard=5)
    shard = tmp_path / "shard-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(CacheError, match=r"shard-00002.safetensors is damaged.*delete it and build"):
        distill(gpt2(1), CachedTeacher(tmp_path), STAGE, windows)
    shard.unlink()
    cache = build_cache(teacher, windows, tmp_path, k=5, temperature=2.0, rows_per_shard=5)
    distill(gpt2(1), cache, STAGE, windows)
    (tmp_path / "teacher.json").write_text("{")
    with pytest.raises(CacheError, match="is damaged"):
        CachedTeacher(tmp_path)


def test_a_cache_of_something_else_is_refused(tmp_path: Path) -> None:
    teacher, windows = gpt2(), Windows(ids())
    cache = build_cache(teacher, windows, tmp_path, k=5, temperature=2.0)
    with pytest.raises(CacheError, match="cache of another teacher:"):
        build_cache(gpt2(seed=5), windows, tmp_path, k=5, temperature=2.0)
    with pytest.raises(CacheError, match="another data and k"):
        build_cache(teacher, Windows(ids(seed=8)), tmp_path, k=6, temperature=2.0)
    with pytest.raises(CacheError, match="was computed on other rows"):
        distill(gpt2(1), cache, STAGE, Windows(ids(seed=8)))
    with pytest.raises(CacheError, match="temperature 1, but the cache was normalised at 2"):
        distill(gpt2(1), cache, {**STAGE, "losses": {"logits": 1}}, windows)
    with pytest.raises(CacheError, match="masked anew each time"):
        build_cache(teacher, MaskedWindows(ids(), MaskTokens(1, 2, 3, 48)), tmp_path, k=5)
    with pytest.raises(CacheError, match="holds no teacher cache"):
        CachedTeacher(tmp_path / "nowhere")


def test_a_full_disk(tmp_path: Path) -> None:
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(StorageError, match="free some space and build again"):
            build_cache(gpt2(), Windows(ids()), tmp_path, k=48)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [file.name for file in tmp_path.iterdir()] == ["teacher.json"]


def lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_processes_that_want_the_same_cache_compute_it_once(tmp_path: Path) -> None:
    asked = [tmp_path / "first.txt", tmp_path / "second.txt"]
    with (
        started("run_cache.py", tmp_path / "cache", asked[0]) as first,
        started("run_cache.py", tmp_path / "cache", asked[1]) as second,
    ):
        for process in (first, second):
            _, message = process.communicate()
            assert process.returncode == 0, message
    assert sorted(map(lines, asked)) == [0, 24 + 1], "one row for the shapes, then every row once"


def test_a_process_that_waits_goes_on_where_another_was_killed(tmp_path: Path) -> None:
    asked = [tmp_path / "first.txt", tmp_path / "second.txt"]
    with started("run_cache.py", tmp_path / "cache", asked[0]) as first:
        while lines(asked[0]) < 7:
            assert first.poll() is None
            time.sleep(0.01)
        with started("run_cache.py", tmp_path / "cache", asked[1]) as second:
            first.kill()
            _, message = second.communicate()
            assert second.returncode == 0, message
    shards = (lines(asked[0]) - 1) // 2  # of two rows; the last of them may not have been written
    assert lines(asked[1]) in (24 - 2 * shards, 24 - 2 * (shards - 1))


def test_a_cache_is_read_row_by_row_from_a_bounded_number_of_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = Windows(ids())
    build_cache(gpt2(), windows, tmp_path, k=48, rows_per_shard=4)
    monkeypatch.setattr(cache_module, "OPEN_SHARDS", 2)
    cache = CachedTeacher(tmp_path)
    expected = gpt2().eval()(ids()).logits.detach()
    gc.collect()
    before = [weakref.ref(x) for x in gc.get_objects() if type(x) is torch.Tensor]  # of other tests in this process
    for row in torch.randperm(24).tolist():
        found = cache.view({"x": ids()}, torch.tensor([row])).logits
        assert isinstance(found, torch.Tensor)
        assert torch.allclose(found, expected[row : row + 1], atol=1e-5)
        del found
    shard = 4 * 8 * 48  # logits
    del expected
    gc.collect()
    known = {id(x) for x in (ref() for ref in before) if x is not None}
    held = [x for x in gc.get_objects() if type(x) is torch.Tensor and x.numel() >= shard and id(x) not in known]
    assert not held, "no shard stays in memory"
    assert len(cache._open) == 2


def test_a_finished_cache_is_opened_without_writing(tmp_path: Path) -> None:
    folder = tmp_path / "read only"
    build_cache(gpt2(), Windows(ids()), folder, k=5)
    lock = tmp_path / ".read only.lock"
    lock.unlink()
    build_cache(gpt2(), Windows(ids()), folder, k=5)
    assert not lock.exists()
    lock.mkdir()
    with pytest.raises(StorageError, match=r"cannot be locked to write it .*: give another cache folder"):
        (folder / "teacher.json").unlink()
        build_cache(gpt2(), Windows(ids()), folder, k=5)


def test_a_classifier_has_one_position_per_row(tmp_path: Path) -> None:
    table = Table({"input_ids": ids(), "labels": torch.arange(24) % 2})
    teacher, live, cached = bert(), bert(1, seed=1), bert(1, seed=1)
    stage = {**STAGE, "losses": {"logits": {"temperature": 2.0}, "cross_entropy": 1.0}}
    distill(live, teacher, stage, table)
    distill(cached, build_cache(teacher, table, tmp_path, k=2, temperature=2.0), stage, table)
    assert same_weights(live, cached)
