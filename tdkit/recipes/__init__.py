"""The recipes that tdkit ships, as YAML files."""
