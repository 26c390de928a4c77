"""One training run, from its configuration to its last checkpoint.

Here everything else is put together: `start` begins or resumes a run, `build` turns the configuration into objects in
the order of a run.
"""
