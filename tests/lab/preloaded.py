"""What every rank would import for itself, imported: the process that clean ranks are forked from loads this module."""

from tests.lab.ranks import preload

preload()
