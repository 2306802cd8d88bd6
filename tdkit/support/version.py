"""The version of tdkit, for files that must not be mixed between versions."""

VERSION = "0.1.0"
