#!/usr/bin/env bash
# torch 2.13.0: all_gather_into_tensor on gloo fills a concatenated output, and refuses the stacked one.
# Its documentation allows both forms: (world * n, ...) and (world, n, ...). With the second, gloo raises: invalid tensor
# size at index 0. Code that was written for NCCL and is tested on CPU ranks meets it.
# Seen: concatenated filled; stacked refused with 'expected (2, 3), got (1, 2, 3'.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$work"
cat >check.py <<'PY'
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def work(rank, path):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    piece = torch.full((2, 3), float(rank))
    whole = torch.empty(4, 3)
    dist.all_gather_into_tensor(whole, piece)
    assert whole.flatten().tolist() == [0.0] * 6 + [1.0] * 6
    try:
        dist.all_gather_into_tensor(torch.empty(2, 2, 3), piece)
    except RuntimeError as error:
        seen = str(error).splitlines()[0]
    else:
        raise AssertionError("it has changed: the stacked form is filled")
    assert "invalid tensor size at index 0" in seen, seen
    if rank == 0:
        print(f"concatenated: filled; stacked: {seen[:100]}")
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(work, (f"{folder}/store",), nprocs=2, start_method="fork")
PY
"$work/venv/bin/python" -W ignore check.py
