"""One process's part of a run: from the configuration to the job that trains, step by step.

Read `job` first: it builds everything in the order of a run. `module` is one optimizer step; `callbacks` look at the
run between steps.
"""
