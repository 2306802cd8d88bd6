"""The `tdkit` command; what a command needs besides its options is imported when it runs: help needs no torch."""
