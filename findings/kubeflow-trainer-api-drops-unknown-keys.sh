#!/usr/bin/env bash
# kubeflow-trainer-api 2.3.0: from_dict drops keys that it does not know, without an error or a warning.
# A manifest with a misspelled key passes through the models and comes out without it: a job of three nodes becomes
# one of the default number. To validate a manifest, hold it against the CRD's schema instead.
# Seen: numNode: 3 (for numNodes) is gone after from_dict(...).to_dict().
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check kubeflow-trainer-api==2.3.0
cd "$work"
cat >check.py <<'PY'
from kubeflow_trainer_api import models

job = {
    "apiVersion": "trainer.kubeflow.org/v1alpha1",
    "kind": "TrainJob",
    "metadata": {"name": "example"},
    "spec": {"runtimeRef": {"name": "torch-distributed"}, "trainer": {"numNode": 3, "image": "example"}},
}
read = models.TrainerV1alpha1TrainJob.from_dict(job).to_dict()
print("trainer:", read["spec"]["trainer"])
assert "numNode" not in str(read) and read["spec"]["trainer"]["image"] == "example", "it has changed"
PY
"$work/venv/bin/python" check.py
