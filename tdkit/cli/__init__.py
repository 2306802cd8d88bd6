"""The `tdkit` command."""
