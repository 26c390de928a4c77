#!/usr/bin/env bash
# hydra-core 1.4.0rc3: it needs a candidate of OmegaConf, 2.4.1rc1 or later, and cannot stand beside OmegaConf 2.4.0, the release.
# pip takes that candidate without --pre. Who pins omegaconf==2.4.0, the newest release, gets ResolutionImpossible.
# Seen: omegaconf 2.4.1rc1 installed; beside omegaconf==2.4.0: conflicting dependencies.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip=("$work/venv/bin/pip" --disable-pip-version-check install --quiet)
if "${pip[@]}" hydra-core==1.4.0rc3 omegaconf==2.4.0 2>"$work/errors"; then
  echo "it has changed: both were installed" >&2
  exit 1
fi
grep -m1 "conflicting dependencies" "$work/errors"
"${pip[@]}" hydra-core==1.4.0rc3
version=$("$work/venv/bin/python" -c 'from importlib.metadata import version; print(version("omegaconf"))')
echo "omegaconf $version"
[[ $version == 2.4.*rc* ]] || { echo "it has changed" >&2; exit 1; }
