"""Estimates of a training job, without a device.

Memory, step time, failures, energy and cost of a layout, and the search for the best one, in pure Python and NumPy.
`calibration.yaml` holds the constants that were fitted to published runs.
"""
