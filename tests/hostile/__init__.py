"""Hostile inputs and faults: mutated files, kills, full disks, exceptions anywhere, plugins that misbehave.

Every outcome must be success or a `tdkit.errors.TdkitError`; nothing may be lost, changed half way or left over.
``python -m tests.hostile.report`` runs all of it and writes ``docs/results/reliability.md``.
"""
