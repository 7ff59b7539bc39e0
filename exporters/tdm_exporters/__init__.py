"""Exports a checkpoint, its adapters fused, to graphs for other runtimes.

`export` loads, writes part by part, compares every part with eager execution and only then gives the folder its name.
`docs/export.md` says what runs where.
"""
