"""Build the cache of a teacher, one line of a file for each row that it is asked about.

python run_cache.py FOLDER FILE
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from distill_models import gpt2, ids

from tdkit_distill import Windows, build_cache


def main(folder: str, asked: str) -> None:
    torch.set_num_threads(1)

    def call(model: Any, batch: Any) -> Any:
        with Path(asked).open("a") as file:
            file.write("row\n" * len(batch["input_ids"]))
        time.sleep(0.05)
        return model(batch["input_ids"])

    cache = build_cache(gpt2(), Windows(ids()), folder, k=5, rows_per_shard=2, batch=2, call=call)
    every = torch.arange(24)
    assert cache.view({"x": every}, every).logits is not None


if __name__ == "__main__":
    main(*sys.argv[1:])
