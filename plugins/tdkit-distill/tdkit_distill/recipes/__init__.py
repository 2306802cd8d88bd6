"""The recipes of this package, as YAML files."""
