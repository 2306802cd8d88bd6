"""Tensor decompositions that compress any PyTorch model.

policy = Policy([Rule("*.mlp.*", LowRank())], budget=0.8)
print(tdkit.plan(model, policy))
model = tdkit.compress(model, policy)
tdkit.save(model, "smaller")
"""

from importlib import import_module
from typing import TYPE_CHECKING

from tdkit.models.registration import register
from tdkit.support.plugins import PROVIDED, provided
from tdkit.support.version import VERSION

if TYPE_CHECKING:
    from tdkit_distill import heal as heal

    from tdkit.public import *  # noqa: F403

__version__ = VERSION

register()


def __getattr__(name: str) -> object:
    """Load `tdkit.public`, and torch with it, when the first of its names is used: the help of commands needs none.

    What packages of this project provide, such as `heal` of tdkit-distill, is imported when it is asked for.
    """
    if name.startswith("__") and name != "__all__":
        raise AttributeError(f"module 'tdkit' has no attribute {name!r}")
    if name in PROVIDED:
        return provided(name)
    public = import_module("tdkit.public")
    globals().update({each: getattr(public, each) for each in ("__all__", *public.__all__)})
    if name not in globals():  # a package, such as tdkit.models, is there once a module of it is loaded
        raise AttributeError(f"module 'tdkit' has no attribute {name!r}")
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *import_module("tdkit.public").__all__})
