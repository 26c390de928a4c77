"""The configuration of a run.

Frozen dataclasses (`schema`), how Hydra composes them from `conf/` and the command line (`compose`), and the checks
that report every mistake at once (`validate`).
"""
