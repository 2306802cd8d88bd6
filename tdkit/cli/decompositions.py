"""``tdkit decompositions``: what is registered."""

from __future__ import annotations

import dataclasses

from tdkit.cli.output import AsJson, Command, show


def decompositions(as_json: AsJson = False) -> None:
    """List the decompositions, their options and the packages they come from."""
    from tdkit.decompositions.registered import decompositions as registry
    from tdkit.errors import RegistryError
    from tdkit.support.tables import table_of

    rows, data = [], []
    for name, owners in registry.origins().items():
        summary = registry.summary(name)
        try:
            fields = dataclasses.fields(registry.get(name))
            options = ", ".join(f.name if f.default is None else f"{f.name}={f.default}" for f in fields)
        except RegistryError:  # the summary says why
            options = ""
        rows.append([name, options, " and ".join(owners), summary])
        data.append({"name": name, "options": options, "packages": owners, "summary": summary})
    table = table_of("decompositions", ["name", "options", "package", "what it is"], rows)
    for column in table.columns:
        column.justify = "left"
    show(table, data, as_json)


COMMANDS = (Command(decompositions, "tdkit decompositions"),)
