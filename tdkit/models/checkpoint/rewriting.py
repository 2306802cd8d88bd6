"""Give a dense model the factorised layers of a description, still without their values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

from torch import Tensor, nn

from tdkit.errors import CheckpointError
from tdkit.models.checkpoint.description import Layer
from tdkit.models.hosts.in_place import parametrized
from tdkit.models.hosts.registered import host_of
from tdkit.models.sites import Site, User
from tdkit.models.swap import Swap
from tdkit.shapes import by
from tdkit.support.compatibility import COMPILED, parameters_of


def rewrite(swap: Swap, layers: Sequence[Layer], place: str) -> None:
    """Replace layers of the model of `swap` by uninitialised factorised ones.

    Args:
        swap: of a dense model, which may be on the meta device.
        layers: of a description.
        place: the folder, for messages.

    Raises:
        CheckpointError: when the layers are not those of this model.
    """
    places = places_of(swap.model)
    for layer in layers:
        users = []
        options = {}
        for name, own in zip(layer.names, layer.options, strict=True):
            user = user_of(swap, name, places, place)
            _check_shape(user, swap.dense(user.layer), name, layer, place)
            users.append(user)
            options[user.layer] = own
        weight = _weight(users[0], swap.dense(users[0].layer))
        matrix = layer.decomposition.empty(layer.shape, device=weight.device, dtype=weight.dtype)
        matrix.error = layer.error
        try:
            swap.put([(Site(tuple(users), tuple(weight.shape)), matrix)], options)
        except TypeError:
            given = ", ".join(map(str, layer.options))
            raise CheckpointError(f"{place}: {given} are no options of {', '.join(layer.names)}") from None


def places_of(model: nn.Module) -> dict[str, str]:
    """Returns the names of modules in the model by those in a file, which know no wrappers of ``torch.compile``."""
    names = (name for name, _ in model.named_modules(remove_duplicate=False) if COMPILED in f"{name}.")
    return {f"{name}.".replace(COMPILED, "").removesuffix("."): name for name in names}


def user_of(swap: Swap, name: str, places: Mapping[str, str], place: str) -> User:
    """Split a name made by `weight_name`: returns the user of the weight."""
    layer, _, weight = name.rpartition(".")
    for named, attribute in ((name, "weight"), (layer, weight)):
        with suppress(AttributeError):
            found = places.get(named, named)
            module = swap.dense(found)
            if attribute == "weight" or attribute in (*parameters_of(module), *parametrized(module)):
                host = host_of(module)
                tensor = getattr(module, attribute, None)
                if host is None or attribute not in host.weights(module) or not isinstance(tensor, Tensor):
                    raise CheckpointError(
                        f"{place}: layer {name} is a {type(module).__name__} in this model, not one that tdkit rewrites"
                    )
                return User(swap.model, found, attribute, host, type(module).__name__, 0)
    raise CheckpointError(f"{place}: this model has no layer {name}: it is another architecture") from None


def _weight(user: User, dense: nn.Module) -> Tensor:
    return user.host.canonical(getattr(dense, user.weight), user.weight)


def _check_shape(user: User, dense: nn.Module, name: str, layer: Layer, place: str) -> None:
    shape = layer.decomposition.shape_of(tuple(_weight(user, dense).shape))
    if shape != layer.shape:
        raise CheckpointError(f"{place}: layer {name} is {by(layer.shape)} in the file, {by(shape)} in this model")
