"""A device that a machine does not have is told by name, before any work."""

from __future__ import annotations

import pytest
import torch

from tdkit.errors import OptionError
from tdkit.support.devices import check_device


def test_a_device_that_is_there() -> None:
    assert check_device(None) is None
    assert check_device("cpu") == torch.device("cpu")
    assert check_device(torch.device("cpu", 0)) == torch.device("cpu", 0)


@pytest.mark.parametrize("name", ["graphics", "cuda:x", "", "cpu:-3"])
def test_a_name_that_is_no_device(name: str) -> None:
    with pytest.raises(OptionError, match=rf"^device='{name}' is no device \(.*\): give cpu, cuda or cuda:1$"):
        check_device(name)


@pytest.mark.skipif(torch.version.cuda is not None or torch.version.hip is not None, reason="this torch has CUDA")
def test_a_torch_without_cuda() -> None:
    message = (
        r"^device='cuda:1' is not available here \(torch .* was built without CUDA\): leave it out to compute on the"
    )
    with pytest.raises(OptionError, match=message):
        check_device(torch.device("cuda", 1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_card_too_many() -> None:
    assert check_device("cuda") == torch.device("cuda")
    with pytest.raises(OptionError, match=r"device='cuda:99' is not available here \(torch sees "):
        check_device("cuda:99")


@pytest.mark.parametrize("name", ["xpu", "mps", "hpu"])
def test_another_kind_of_device(name: str) -> None:
    if getattr(torch, name, None) is not None and getattr(torch, name).is_available():
        pytest.skip(f"this machine has {name}")
    with pytest.raises(OptionError, match=rf"device='{name}' is not available here"):
        check_device(name)
