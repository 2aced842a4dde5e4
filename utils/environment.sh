# Sourced by run_all.sh and tests/run.sh: finds or makes a Python environment that has what
# requirements.txt names; $PYTHON is its interpreter. Says what it does; exits where it cannot.

environment_fail() {
    echo "set-up: $1" >&2
    exit 3
}

# What `$1` (a Python) lacks of requirements.txt, one name a line. Versions may be newer or older
# than the pinned ones: whoever brings an environment has chosen them.
environment_lacks() {
    "$1" - "$ROOT/requirements.txt" <<'PY'
import importlib.metadata, re, sys
for line in open(sys.argv[1], encoding="utf-8"):
    name = re.match(r"[A-Za-z0-9_.-]*", line).group()
    if name:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            print(name)
PY
}

environment_python() {
    local candidate
    for candidate in python3 python python3.13 python3.12 python3.11 python3.10; do
        if command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))'; then
            command -v "$candidate"
            return
        fi
    done
    environment_fail "no Python 3.10 to 3.13 found on the PATH; install one (Debian: apt-get install python3 python3-venv)"
}

set_up_environment() {
    local python lacking free_kb
    python=$(environment_python) || exit 3
    if [ -z "$(environment_lacks "$python")" ]; then
        export PYTHON="$python"
        return
    fi
    if [ -x "$ROOT/.venv/bin/python" ] && [ -z "$(environment_lacks "$ROOT/.venv/bin/python")" ]; then
        environment_use_venv
        return
    fi
    lacking=$(environment_lacks "$python" | tr '\n' ' ')
    echo "set-up: $python lacks ${lacking}→ making $ROOT/.venv from requirements.txt (some minutes)"
    free_kb=$(df -Pk "$ROOT" | awk 'NR == 2 { print $4 }')
    [ "$free_kb" -gt 4000000 ] || environment_fail "only $((free_kb / 1024)) MiB free in $ROOT; 4 GB are needed"
    "$python" -m venv "$ROOT/.venv" ||
        environment_fail "python -m venv failed; on Debian install python3-venv"
    # torch first and alone: packages that ask for any torch are then content with this one.
    "$ROOT/.venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        "$(grep '^torch==' "$ROOT/requirements.txt" | cut -d' ' -f1)" setuptools wheel &&
        "$ROOT/.venv/bin/python" -m pip install --quiet --disable-pip-version-check \
            -r "$ROOT/requirements.txt" ||
        environment_fail "pip could not install requirements.txt (its message is above)"
    environment_use_venv
    echo "set-up: done"
}

environment_use_venv() {
    export PYTHON="$ROOT/.venv/bin/python" PATH="$ROOT/.venv/bin:$PATH" VIRTUAL_ENV="$ROOT/.venv"
}
