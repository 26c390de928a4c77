"""A model of one's own, as a package outside of `orchestrator`: see README.md beside it."""
