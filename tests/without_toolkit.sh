#!/usr/bin/env bash
# Run a command as on a machine without a CUDA toolkit, wherever this one keeps it:
#
#   bash tests/without_toolkit.sh COMMAND …
#
# torch looks at CUDA_HOME and CUDA_PATH, for nvcc on the PATH, then for /usr/local/cuda.
set -euo pipefail
unset CUDA_HOME CUDA_PATH
without=""
IFS=: read -ra folders <<<"$PATH"
for folder in "${folders[@]}"; do
    [ -e "$folder/nvcc" ] || without+="${without:+:}$folder"
done
hidden=$(mktemp -d)
trap 'rm -rf "$hidden"' EXIT
# Python reads this file when it starts, if it is on its path.
cat >"$hidden/sitecustomize.py" <<'PY'
import os

_exists = os.path.exists
os.path.exists = lambda path: path != "/usr/local/cuda" and _exists(path)
PY
PATH="$without" PYTHONPATH="$hidden${PYTHONPATH:+:$PYTHONPATH}" "$@"
