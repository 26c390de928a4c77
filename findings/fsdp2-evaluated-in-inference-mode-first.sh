#!/usr/bin/env bash
# torch 2.13.0: a model of FSDP2 that is first called in inference_mode cannot be trained; after no_grad it can.
# What the first forward pass gathers into is kept for all later ones, and is then a tensor of inference mode. So a
# validation before the first step, as frameworks do it, ends the training (lightning 2.6.6 leaves inference_mode out on
# gloo and for its FSDPStrategy only).
# Seen: RuntimeError 'Inplace update to inference tensor outside InferenceMode is not allowed'.
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
from torch import nn
from torch.distributed.fsdp import fully_shard


def trains_after(mode):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    with mode():
        model(torch.ones(2, 4))
    try:
        model(torch.ones(2, 4)).sum().backward()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return "trains"


def work(rank, path):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    seen = trains_after(torch.no_grad), trains_after(torch.inference_mode)
    assert seen[0] == "trains", seen
    assert "nference" in seen[1], f"it has changed: {seen[1]}"
    if rank == 0:
        print(f"after no_grad: {seen[0]}; after inference_mode: {seen[1][:90]}")
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(work, (f"{folder}/store",), nprocs=2, start_method="fork")
PY
"$work/venv/bin/python" -W ignore check.py
