"""Runs on disk: the directory of a run, its identity and record, and how one is found, resumed or started from.

No torch and no device: the launcher uses this package before it starts a process.
"""
