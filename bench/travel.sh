#!/usr/bin/env bash
# Fills a folder with what a rented GPU machine lacks, for TRAVEL=FOLDER bench/gpu.sh: packages, images,
# published code to compare with, the commit. Each line says how large it is, for a machine takes only so much.
#
#   CIFAR100=DIR BCL=FILE SUPCONTRAST=FILE bench/travel.sh FOLDER
#
#   CIFAR100=DIR, CIFAR10=DIR   the data sets, as train/run.py takes them: packed at imbalance 100, once
#   BCL=FILE, SUPCONTRAST=FILE  loss/contrastive.py of BCL's repository, losses.py of SupContrast's
#   RUNS=FOLDER, CACHES=FILE    what an earlier call gave back: TABLE.jsonl, runs-*.tar.gz; caches.tar.xz
#   DALI=FOLDER                 outside FOLDER, for it travels in pieces: gets DALI's wheels (bench/dali_wheels.txt)
#   PLATFORM=VERSION            of the machine's Python (default: 3.12)
#   PYTHON=.venv/bin/python     of this machine
set -euo pipefail
[[ $# == 1 && $1 != -* ]] || { sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 2; }
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-$root/.venv/bin/python}
[[ -x $PYTHON ]] || { echo "travel.sh: no $PYTHON: make .venv/installed makes it" >&2; exit 2; }
mkdir -p "$1"
folder=$(cd "$1" && pwd)

# For another machine's Python, without what they need: pip would want PyTorch too.
there=(--quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version "${PLATFORM:-3.12}"
  --implementation cp --platform manylinux2014_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_28_x86_64)
# Exactly those that bench/gpu_stack.txt lacks, as the lock has them; unpacked, for a wheel of plotly is twice as large.
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
"$PYTHON" -m pip install "${there[@]}" --no-compile --root-user-action ignore --target "$site" \
  $(grep -E '^(tyro|typeguard|docstring-parser|plotly)==' "$root/requirements.lock")
tar -cJf "$folder/packages.tar.xz" -C "$site" .
[[ -z ${DALI:-} ]] || "$PYTHON" -m pip download "${there[@]}" --dest "$DALI" --requirement "$root/bench/dali_wheels.txt"

for name in CIFAR100 CIFAR10; do
  target=$folder/${name,,}_lt.tar
  [[ -z ${!name:-} || -f $target ]] ||
    "$PYTHON" "$root/bench/pack.py" pack --dataset "${name,,}_lt" --data "${!name}" --imbalance 100 "$target"
done
[[ -z ${BCL:-} ]] || cp "$BCL" "$folder/bcl.py"
[[ -z ${SUPCONTRAST:-} ]] || cp "$SUPCONTRAST" "$folder/supcontrast.py"
[[ -z ${CACHES:-} ]] || cp "$CACHES" "$folder/caches.tar.xz"
[[ -z ${RUNS:-} ]] || { rm -rf "$folder/runs"; cp -r "$RUNS" "$folder/runs"; }
git -C "$root" describe --always --dirty --exclude '*' > "$folder/commit"
(cd "$folder" && du -sh -- * && du -sh . | sed 's/\.$/all of it/')
