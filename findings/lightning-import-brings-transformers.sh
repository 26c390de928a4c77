#!/usr/bin/env bash
# lightning 2.6.6, torchmetrics 1.9.0: `import lightning` imports transformers where that is installed, and torch._dynamo,
# torch.export and sympy wherever. One name of torchmetrics.functional is enough: its package imports every metric of
# text, and BERTScore's module imports AutoModel and AutoTokenizer when it is loaded, not when it is used. So each process
# of a job pays for libraries that its training never calls, and a broken transformers ends programs that do not use it.
# Seen: torch 2.2 s of processor time, lightning 4.0 s more, and 48 modules of transformers 5.23.0 are loaded.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
  lightning==2.6.6 torchmetrics==1.9.0 torch==2.13.0 transformers==5.23.0 numpy==2.4.6
cd "$work"
cat >check.py <<'PY'
import sys
import time

begin = time.process_time()
import torch

torch_seconds, begin = time.process_time() - begin, time.process_time()
assert "torch._dynamo" not in sys.modules
import lightning

lightning_seconds = time.process_time() - begin
loaded = {name.split(".")[0] for name in sys.modules}
own = sum(name.split(".")[0] == "transformers" for name in sys.modules)
print(f"import torch: {torch_seconds:.1f} s of processor time; import lightning: {lightning_seconds:.1f} s more;"
      f" {own} modules of transformers")
assert own >= 10 and "torchmetrics.functional.text.bert" in sys.modules, "it has changed"
assert "torch._dynamo" in sys.modules and "torch.export" in sys.modules and "sympy" in loaded, "it has changed"
PY
"$work/venv/bin/python" -W ignore check.py
