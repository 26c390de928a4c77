"""Accelerators as data: peak rates, memory, links and prices, each with its source or `unknown`."""
