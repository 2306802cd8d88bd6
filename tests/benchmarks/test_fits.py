"""The benchmark of fits compares equals: every way to the same factors loses as much, and its page shows all of it."""

from pathlib import Path

import pytest
import torch

from tdkit.fitting.linalg import relative_error
from tests.benchmarks import fits


def test_all_ways_to_the_same_factors_lose_as_much() -> None:
    weight = fits.random_weight((768, 768), 0)
    for factors, ways in fits.contenders(weight).items():
        ours, *others = (relative_error(weight, call()) for call in ways.values())
        assert 0.3 < ours < 0.99, factors
        assert others == pytest.approx([ours] * len(others), rel=1e-4), factors


def test_what_was_measured_before_stays_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fits, "BLOCK", {"attn.c_proj": (64, 96)})
    monkeypatch.setattr(fits, "peers", lambda: [{"how": "tdkit", "seconds": 0.25}])
    small = fits.time_small
    monkeypatch.setattr(fits, "time_small", lambda: small({"tiny": (fits.gpt2(16, 1, 40), 40, 2.0)}))
    options = ["--layers", "1", "--threads", str(torch.get_num_threads()), "--out", str(tmp_path)]
    for part in ("seconds", "peers", "small"):
        monkeypatch.setattr("sys.argv", ["fits.py", "--parts", part, *options])
        fits.main()
    page = (tmp_path / "fits.md").read_text(encoding="utf-8")
    assert "| low_rank | calibrated | 0.66 | 1 |" in page
    assert "| permuted_kronecker | plain |" in page
    assert "| tdkit | 0.25 |" in page
    assert "| tiny |" in page


def test_an_unknown_part_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["fits.py", "--parts", "second"])
    with pytest.raises(SystemExit):
        fits.main()
    assert "--parts second: there are seconds, peers, objective, small" in capsys.readouterr().err
