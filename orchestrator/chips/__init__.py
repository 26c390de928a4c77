"""The catalogue of accelerators, as data.

Peak rates, memory, links and prices stand in `chips.yaml`, each with its source or `unknown`. The planner and the
throughput figures read it.
"""
