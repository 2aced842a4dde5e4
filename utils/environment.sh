# Sourced by run_all.sh and tests/run.sh: finds or makes a Python environment that has what
# requirements.txt names; $PYTHON is its interpreter. Says what it does; exits where it cannot.

environment_fail() {
    echo "set-up: $1" >&2
    exit 3
}

# What `$1` (a Python) has of requirements.txt, one finding a line: "lacks NAME …", where it is not there
# or older than the "from VERSION (why)" of its comment; "newer NAME …", where it is newer than the pin.
# Between the two nothing is said: whoever brings an environment has chosen it.
environment_report() {
    "$1" - "$ROOT/requirements.txt" <<'PY'
import importlib.metadata, re, sys
def release(version):  # 2.11.0a0+git of a vendor's container counts as 2.11
    return [int(n) for n in re.findall(r"\d+", re.match(r"[\d.]*", version).group())]
for line in open(sys.argv[1], encoding="utf-8"):
    name, _, pin = line.partition("#")[0].strip().partition("==")
    floor = re.search(r"# from ([\d.]+\d) \((.*?)\)", line)
    if name:
        try:
            have = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            print("lacks", name)
            continue
        if floor and release(have) < release(floor[1]):
            print(f"lacks {name} {floor[1]} or newer ({floor[2]}; it has {have})")
        elif release(have) > release(pin):
            print(f"newer {name} {have} ({pin})")
PY
}

environment_lacks() {
    environment_report "$1" | sed -n 's/^lacks //p'
}

# Say once what no test has seen.
environment_use() {
    local newer
    newer=$(environment_report "$1" | sed -n 's/^newer //p' | paste -sd, | sed 's/,/, /g')
    [ -z "$newer" ] || echo "set-up: newer than what was tested (in brackets): $newer"
    export PYTHON="$1"
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
    local python lacking
    python=$(environment_python) || exit 3
    if [ -z "$(environment_lacks "$python")" ]; then
        environment_use "$python"
        return
    fi
    if [ -x "$ROOT/.venv/bin/python" ] && [ -z "$(environment_lacks "$ROOT/.venv/bin/python")" ]; then
        environment_use_venv
        return
    fi
    lacking=$(environment_lacks "$python" | paste -sd, | sed 's/,/, /g')
    echo "set-up: $python lacks $lacking → making $ROOT/.venv from requirements.txt (some minutes)"
    "$python" -m venv "$ROOT/.venv" ||
        environment_fail "python -m venv failed; on Debian install python3-venv"
    environment_check_disk
    # torch first and alone: packages that ask for any torch are then content with this one.
    "$ROOT/.venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        "$(environment_torch)" setuptools wheel &&
        "$ROOT/.venv/bin/python" -m pip install --quiet --disable-pip-version-check \
            -r "$ROOT/requirements.txt" ||
        environment_fail "pip could not install requirements.txt (its message is above)"
    environment_use_venv
    echo "set-up: done"
}

environment_use_venv() {
    export PATH="$ROOT/.venv/bin:$PATH" VIRTUAL_ENV="$ROOT/.venv"
    environment_use "$ROOT/.venv/bin/python"
}

environment_torch() { grep '^torch==' "$ROOT/requirements.txt" | cut -d' ' -f1; }

# torch for CUDA brings NVIDIA's libraries: 10 GB with pip's own copies, where torch for CPUs takes 4.
# Which of the two it will be pip knows (one before 22.2 does not tell, and may mean the large one).
environment_check_disk() {
    local free_kb need=10 told
    free_kb=$(df -Pk "$ROOT" | awk 'NR == 2 { print $4 }')
    [ "$free_kb" -le 10000000 ] || return 0
    told=$("$ROOT/.venv/bin/python" -m pip install --quiet --disable-pip-version-check --dry-run \
        --no-deps --ignore-installed --report - "$(environment_torch)" 2>/dev/null) &&
        ! grep -qiE '"(nvidia|cuda)-' <<<"$told" && need=4
    [ "$free_kb" -gt ${need}000000 ] || environment_fail "only $((free_kb / 1024)) MiB free in $ROOT;\
 $need GB are needed, as pip takes torch for $([ $need = 4 ] && echo CPUs || echo CUDA)"
}

# A GPU that torch cannot use would leave the run on the CPU without a word, for days: exits. Where
# there is none, or it is hidden on purpose, DS_ACCELERATOR=cpu is set, so that DeepSpeed need not
# look for one in every process.
set_up_accelerator() {
    local gpu why
    [ -z "${DS_ACCELERATOR:-}" ] || return 0
    why=$("$PYTHON" - <<'PY'
import warnings
import torch
warnings.simplefilter("ignore")  # of what is asked for below
if not torch.cuda.is_available():
    reason = "it finds none"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
    print(f"{reason} (torch {torch.__version__}, built for CUDA {torch.version.cuda})")
PY
    ) || environment_fail "$PYTHON cannot import torch (its message is above)"
    [ -n "$why" ] || return 0
    export DS_ACCELERATOR=cpu
    case ${CUDA_VISIBLE_DEVICES-unset} in "" | -* | [Nn]o*) return 0 ;; esac
    gpu=$(nvidia_gpu)
    [ -z "$gpu" ] || environment_fail "this machine has a GPU ($gpu) that torch cannot use: $why.
Install a driver new enough for this torch or a torch for this driver, or correct CUDA_VISIBLE_DEVICES\
 (now ${CUDA_VISIBLE_DEVICES-not set}); to run on the CPU all the same, set DS_ACCELERATOR=cpu"
}

# The first GPU that this process may open, by name or as a device; nothing where there is none.
nvidia_gpu() {
    nvidia-smi -L 2>/dev/null | grep -m 1 '^GPU' || compgen -G '/dev/nvidia[0-9]*' | head -n 1
}
