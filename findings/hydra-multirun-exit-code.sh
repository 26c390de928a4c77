#!/usr/bin/env bash
# hydra-core 1.3.8: a job of a multirun that calls sys.exit(0) ends the whole sweep, and the sweep counts as a success.
# The jobs behind it never run and nothing says so: the exit code is 0. A training script that ends by sys.exit after
# its own clean-up silently trains one point of a sweep.
# Seen: three jobs asked for, one run, exit code 0.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check hydra-core==1.3.8
cd "$work"
cat >check.py <<'PY'
import pathlib
import subprocess
import sys

pathlib.Path("app.py").write_text(
    "import sys\nimport hydra\n\n\n@hydra.main(version_base='1.3', config_path=None)\n"
    "def main(cfg):\n    print('job', cfg.x, flush=True)\n    sys.exit(0)\n\n\nmain()\n"
)
done = subprocess.run([sys.executable, "app.py", "-m", "+x=1,2,3"], capture_output=True, text=True)
jobs = [line for line in done.stdout.splitlines() if line.startswith("job")]
print("exit code", done.returncode, jobs)
assert done.returncode == 0 and jobs == ["job 1"], "it has changed"
PY
"$work/venv/bin/python" check.py
