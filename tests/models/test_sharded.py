"""DDP and FSDP2 of compressed models: the numbers of one process, also where dense weights may be cached."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.together import run_together


@pytest.mark.skipif(sys.platform != "linux", reason="gloo over a file")
def test_a_model_in_two_processes_computes_and_trains_as_in_one(tmp_path: Path) -> None:
    program = """
        import json
        from tests.models.run_sharded import run
        torch.set_num_threads(1)
        say(json.dumps(run()))
    """
    for lines in run_together(tmp_path, program):
        gaps = json.loads(lines[-1])
        assert len(gaps) == 24
        assert {name: gap for name, gap in gaps.items() if not gap < 1e-4} == {}
