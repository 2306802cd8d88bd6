"""``tdkit sources``: the models and texts that are registered."""

from __future__ import annotations

from typing import Any

from tdkit.cli.output import AsJson, Command, show


def sources(as_json: AsJson = False) -> None:
    """List the models and texts that can be given by name and the packages they come from."""
    from tdkit.registry import Registry
    from tdkit.sources.models import model_sources
    from tdkit.sources.texts import text_sources
    from tdkit.support.tables import table_of

    registries: dict[str, Registry[Any]] = {"model": model_sources, "text": text_sources}
    rows, data = [], []
    for kind, registry in registries.items():
        for name, owners in registry.origins().items():
            summary = registry.summary(name)
            rows.append([kind, name, " and ".join(owners), summary])
            data.append({"kind": kind, "name": name, "packages": owners, "summary": summary})
    table = table_of("models and texts by name", ["kind", "name", "package", "what it is"], rows)
    for column in table.columns:
        column.justify = "left"
    show(table, data, as_json)


COMMANDS = (Command(sources, "tdkit sources"),)
