"""Stopping well, and finding processes that are lost or hang.

SIGINT and SIGTERM become one stop at the same step on all ranks; heartbeats tell which process is missing when a
collective fails or times out.
"""
