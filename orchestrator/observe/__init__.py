"""What a run shows: metrics, progress, throughput and reports.

Metrics files, TensorBoard and W&B, the progress bar, tokens per second and MFU, and the HTML reports of runs and
plans. None of it can end a training run.
"""
