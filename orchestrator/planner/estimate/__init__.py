"""Estimates of one layout from the shapes alone: operations, bytes, seconds, failures, money."""
