"""On the XLA strategy each source has the losses that it has on the torch-native one, also while the batch grows."""

from __future__ import annotations

import numpy as np

from tests.lab.runs import read_rows, write_corpus
from tests.xla.test_conformance import NATIVE, RELATIVE, XLA, runs  # noqa: F401


def test_losses_by_source_and_sizes_by_step(runs):  # noqa: F811
    corpus = write_corpus(runs.tmp / "more")
    one = f"{{path: '{corpus}', weight: 3, name: all}}, {{path: '{corpus[:-5]}0*.txt', weight: 1, name: some}}"
    words = (f"data.sources=[{one}]", "train.batch_warmup=[{steps: 3, tokens: 256}]", "train.max_steps=6")
    tables = []
    for run_dir in (runs(*words, *XLA["fsdp2_tensor2"]), runs(*words, python=NATIVE)):
        rows = [row for row in read_rows(run_dir) if "loss" in row]
        tables.append([[row[key] for key in ("loss", "loss/all", "loss/some", "tokens")] for row in rows])
    assert len(tables[0]) == 6
    np.testing.assert_allclose(*tables, rtol=RELATIVE)
