"""TensorLy's partial Tucker decomposition, by its torch backend, without a trace on the caller's backend."""

from __future__ import annotations

from threading import Thread

import torch
from torch import Tensor

from tdkit.errors import TdkitError

SWEEPS = 10  # of higher-order orthogonal iteration; three or four reach the tolerance
TOLERANCE = 1e-4  # of the change of the relative error


def partial_tucker(
    tensor: Tensor,  # (out, m, t)
    ranks: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Orthonormal bases U (out, ranks[0]) and V (m, ranks[1]) by higher-order orthogonal iteration.

    TensorLy keeps its backend for the process and for each thread, and leaving its ``backend_context`` sets the one
    of the process. The computation therefore runs in a thread of its own, for which alone the backend is set.

    Args:
        tensor: float64, not zero.
        ranks: of the first two modes; each at most its mode, and at most t times the other.

    Raises:
        TdkitError: when TensorLy's static dispatch is on, which fixes another backend for all threads.

    Source: De Lathauwer et al. (2000), "On the best rank-1 and rank-(R1, ..., RN) approximation", section 4.
    """
    found: list[tuple[Tensor, Tensor]] = []
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with torch.no_grad():
                found.append(_partial_tucker(tensor, ranks))
        except BaseException as error:  # raised again by the caller's thread
            failures.append(error)

    thread = Thread(target=work, name="tdkit-tensorly")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return found[0]


def _partial_tucker(tensor: Tensor, ranks: tuple[int, int]) -> tuple[Tensor, Tensor]:
    import tensorly  # lazy: `import tdkit` does not load it
    from tensorly.decomposition import partial_tucker as iterate

    tensorly.set_backend("pytorch", local_threadsafe=True)
    if not isinstance(tensorly.backend.tensor(0.0), Tensor):
        raise TdkitError(
            "tensorly.use_static_dispatch() fixed a backend other than pytorch for all threads: call "
            "tensorly.use_dynamic_dispatch() before the fit"
        )
    (_, (left, right)), _ = iterate(tensor, list(ranks), modes=[0, 1], n_iter_max=SWEEPS, tol=TOLERANCE, random_state=0)
    return left, right
