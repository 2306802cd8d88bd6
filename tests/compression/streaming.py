"""Folders to compress layer by layer, and runs of `compress_folder` in other processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]


def write_folder(model: Any, folder: Path, *, dtype: torch.dtype = torch.bfloat16, shard: str = "20KB") -> Path:
    """Save a transformers model in several files."""
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Run Python code in a new process, with the tree of these tests and one thread."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
