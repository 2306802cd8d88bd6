"""TensorLy serves as the start of Tucker fits and its backend stays as the caller set it, in every thread."""

from __future__ import annotations

import json
import subprocess
import sys
import threading

import pytest
import tensorly
import torch
from torch import Tensor

from tdkit import Tucker
from tdkit.fitting.tensorly_tucker import partial_tucker


def weight() -> Tensor:
    return torch.randn(6, 5, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def backend_of_a_new_thread() -> str:
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(tensorly.get_backend()))
    thread.start()
    thread.join()
    return found[0]


def test_the_bases_are_orthonormal_and_better_than_a_higher_order_svd() -> None:
    tensor = weight()
    left, right = partial_tucker(tensor, (3, 2))
    assert torch.allclose(left.T @ left, torch.eye(3, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(right.T @ right, torch.eye(2, dtype=torch.float64), atol=1e-12)
    unfolded = [tensor.flatten(1), tensor.transpose(0, 1).flatten(1)]
    separate = [torch.linalg.svd(u).U[:, :rank] for u, rank in zip(unfolded, (3, 2), strict=True)]
    kept = [torch.einsum("oit,oa,ib->abt", tensor, *bases).norm() for bases in ((left, right), separate)]
    assert kept[0] > kept[1] * 1.01


@pytest.mark.parametrize("local", [False, True])
def test_a_fit_leaves_the_backend_of_every_thread_as_it_is(local: bool) -> None:
    """Leaving `tensorly.backend_context` would set that of the process to that of this thread."""
    before = tensorly.get_backend(), backend_of_a_new_thread()
    assert before == ("numpy", "numpy")
    if local:
        tensorly.set_backend("pytorch", local_threadsafe=True)
    try:
        Tucker(rank_out=3, rank_in=2).fit(weight())
        assert tensorly.get_backend() == ("pytorch" if local else "numpy")
        assert backend_of_a_new_thread() == "numpy"
    finally:
        tensorly.set_backend("numpy")


def test_fits_in_several_threads_beside_users_of_other_backends() -> None:
    kind, tensor = Tucker(rank_out=3, rank_in=2), weight()
    alone = kind.fit(tensor).dense()
    done, wrong = threading.Event(), []

    def use_numpy() -> None:
        while not done.is_set():
            if tensorly.get_backend() != "numpy":
                wrong.append(tensorly.get_backend())

    user = threading.Thread(target=use_numpy)
    user.start()
    found: list[Tensor] = []
    fits = [threading.Thread(target=lambda: found.append(kind.fit(tensor).dense())) for _ in range(4)]
    for thread in fits:
        thread.start()
    for thread in fits:
        thread.join()
    done.set()
    user.join()
    assert wrong == []
    assert len(found) == 4
    assert all(torch.equal(each, alone) for each in found)


def test_an_error_of_the_thread_is_raised_by_the_caller() -> None:
    with pytest.raises(torch.linalg.LinAlgError):
        partial_tucker(torch.full((3, 2, 2), float("nan"), dtype=torch.float64), (2, 1))


def test_static_dispatch_to_another_backend_is_told() -> None:
    code = """
import json, tensorly, torch
from tdkit.errors import TdkitError
from tdkit.fitting.tensorly_tucker import partial_tucker
tensorly.use_static_dispatch()
try:
    partial_tucker(torch.ones(3, 2, 2, dtype=torch.float64), (2, 1))
except TdkitError as error:
    print(json.dumps(str(error)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "call tensorly.use_dynamic_dispatch() before the fit" in json.loads(done.stdout)
