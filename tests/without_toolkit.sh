#!/usr/bin/env bash
# Run a command as on a machine without a CUDA toolkit, wherever this one keeps it:
#
#   bash tests/without_toolkit.sh COMMAND …
#
# torch looks at CUDA_HOME and CUDA_PATH, for nvcc on the PATH, then for /usr/local/cuda.
set -euo pipefail
unset CUDA_HOME CUDA_PATH
hidden=$(mktemp -d)
trap 'rm -rf "$hidden"' EXIT
# Python reads this file when it starts, if it is on its path. (nvcc's folder may be Python's own,
# which must stay on the PATH.)
cat >"$hidden/sitecustomize.py" <<'PY'
import os
import shutil

_exists, _which = os.path.exists, shutil.which
os.path.exists = lambda path: path != "/usr/local/cuda" and _exists(path)
shutil.which = lambda name, *args, **more: None if name == "nvcc" else _which(name, *args, **more)
PY
PYTHONPATH="$hidden${PYTHONPATH:+:$PYTHONPATH}" "$@"
