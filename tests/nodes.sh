#!/usr/bin/env bash
# The tests of several nodes on one machine: bash tests/nodes.sh [pytest arguments, e.g. -k slurm]
#
# Two machines made of Linux namespaces, each with its own sshd, joined by pdsh; and Slurm with two
# slurmd. Needs root (namespaces, mounts) and Debian's packages openssh-server, openssh-client, pdsh,
# iproute2, slurm-wlm and munge. All it makes lies in namespaces and in temporary folders: neither
# ~/.ssh nor /etc is written to, and no service of the system is used or started.
set -uo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
[ "$(id -u)" = 0 ] || { echo "tests/nodes.sh: needs root, to make namespaces: sudo bash tests/nodes.sh" >&2; exit 3; }
PATH="$PATH:/usr/sbin:/sbin"
missing=""
while read -r tool package; do
    command -v "$tool" >/dev/null || missing+=" $package"
done <<'END'
sshd openssh-server
ssh openssh-client
pdsh pdsh
ip iproute2
slurmctld slurm-wlm
munged munge
END
[ -z "$missing" ] || {
    echo "tests/nodes.sh: Debian packages are missing: apt-get update && apt-get install -y$missing" >&2
    exit 3
}
. "$ROOT/utils/environment.sh"
set_up_environment
cd "$ROOT" || exit
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
"$PYTHON" -m pytest -n 0 -s -m nodes tests/launch/test_nodes.py tests/launch/test_slurm.py "$@"
