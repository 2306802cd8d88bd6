"""``python tests/extras.py FOLDER [EXTRA ...]``: install tdkit with each extra alone, in environments of their own.

In each of them every module of tdkit is imported, as are the packages of the extra, and a model is compressed. "none"
stands for tdkit without extras. It needs nothing but Python, and pip downloads what constraints.txt names.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODULES = {"lm-eval": "lm_eval"}  # of packages whose module has another name
NOT_ALONE = ("dev", "docs")  # what the repository is worked on with
ONLY_WITH = {  # modules that are imported by what has looked for the package
    "tdkit.products.kernels": "triton",
    "tdkit.models.quantizer": "transformers",
}

CODE = """
import importlib.util, pkgutil, sys
import tdkit
import tdkit.errors

owners, needed = [each.split(":") for each in sys.argv[1].split()], sys.argv[2:]
without = [module for module, package in owners if importlib.util.find_spec(package) is None]
for name in needed:
    importlib.import_module(name)
names = [each.name for each in pkgutil.walk_packages(tdkit.__path__, "tdkit.", onerror=lambda name: None)]
for name in names:
    try:
        if not name.startswith(tuple(without)):
            importlib.import_module(name)
    except tdkit.errors.MissingDependencyError as error:  # of a module for another extra, which says so
        assert "pip install" in str(error), error
import torch
from torch import nn
x = torch.randn(2, 32)
model = tdkit.compress(nn.Sequential(nn.Linear(32, 32)), tdkit.Policy([tdkit.Rule("*", "low_rank")], budget=0.8))
assert model(x).shape == (2, 32)
print(f"{len(names)} modules")
"""


def main(place: Path, wanted: list[str]) -> None:
    """Try each extra; ends with 1 when one does not import."""
    form = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras: dict[str, list[str]] = {"none": [], **form["optional-dependencies"]}
    failed = []
    for extra in wanted or [name for name in extras if name not in NOT_ALONE]:
        folder = place / extra
        venv.create(folder, with_pip=True, clear=True)
        python = folder / "bin" / "python"
        target = str(ROOT) if extra == "none" else f"{ROOT}[{extra}]"
        install = [python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", target]
        names = [re.split(r"[\s\[<>=!;]", each)[0] for each in extras[extra]]
        modules = [MODULES.get(name, name) for name in names if name != "tdkit"]
        owners = " ".join(f"{module}:{package}" for module, package in ONLY_WITH.items())
        done = (
            subprocess.run(install, check=False).returncode
            or subprocess.run(
                [python, "-W", "error::ImportWarning", "-c", CODE, owners, *modules],
                cwd=place,
                check=False,
            ).returncode
        )
        print(f"{extra}: {'failed' if done else 'works'}", flush=True)
        failed += [extra] if done else []
        shutil.rmtree(folder)
    raise SystemExit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])
