#!/usr/bin/env bash
# torch_xla 2.9.0: on its CPU device max() and amax() leave out NaN, and clamp turns infinity into the largest float.
# torch's own CPU operations propagate both. A guard that looks for divergence by the maximum of gradients, or that
# clamps before it looks, finds nothing there: the figure that it tests is finite. isfinite().all() is right.
# Seen: the maximum of [1, NaN, 2] is 2; [inf, -inf, NaN].clamp(min=0) is [3.4e38, 0, NaN], and .clamp(max=0) is
# [0, -3.4e38, -3.4e38]; amax() without dims reduces nothing; the running sum of booleans is made of booleans.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for python in python3.12 python3.11 python3; do "$python" --version >/dev/null 2>&1 && break; done # none for 3.13 and later
"$python" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.9.0 torch_xla==2.9.0 "numpy<3"
cd "$work"
cat >check.py <<'PY'
import math

import torch
import torch_xla

device, inf, nan = torch_xla.device(), math.inf, math.nan
numbers, edges, largest = torch.tensor([1.0, nan, 2.0]), torch.tensor([inf, -inf, nan]), torch.finfo(torch.float32).max
there = numbers.to(device)
figures = {
    "max": (there.max().item(), numbers.max().item()),
    "amax(0)": (there.amax(0).item(), numbers.amax(0).item()),
    "clamp(min=0)": (edges.to(device).clamp(min=0).tolist(), edges.clamp(min=0).tolist()),
    "clamp(max=0)": (edges.to(device).clamp(max=0).tolist(), edges.clamp(max=0).tolist()),
    "shape of amax()": (tuple(torch.ones(2, 3).to(device).amax().shape), tuple(torch.ones(2, 3).amax().shape)),
    "cumsum of booleans": (
        torch.tensor([True, True]).to(device).cumsum(0).tolist(),
        torch.tensor([True, True]).cumsum(0).tolist(),
    ),
}
for name, (seen, on_torch) in figures.items():
    print(f"{name}: {seen} on the XLA device, {on_torch} by torch")
seen = {name: pair[0] for name, pair in figures.items()}
assert seen["max"] == seen["amax(0)"] == 2.0, "it has changed"
assert seen["clamp(min=0)"][:2] == [largest, 0.0] and math.isnan(seen["clamp(min=0)"][2]), "it has changed"
assert seen["clamp(max=0)"] == [0.0, -largest, -largest], "it has changed"
assert seen["shape of amax()"] == (2, 3) and seen["cumsum of booleans"] == [True, True], "it has changed"
assert not there.isfinite().all().item(), "isfinite finds it"
PY
PJRT_DEVICE=CPU "$work/venv/bin/python" check.py
