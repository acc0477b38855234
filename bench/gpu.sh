#!/usr/bin/env bash
# All that a CUDA GPU can say of the project: bench/gpu.sh --help. PyTorch's image suffices, without network.
# This makes the packages visible by links and unpacks what is missing, then hands over to bench/gpu.py.
#   PYTHON=python3       the one that has PyTorch
#   WHEELS=FOLDER        wheels of what it lacks; or TRAVEL/packages.tar.xz, where it is there
#   SCRATCH=FOLDER       what stays between the calls on one machine; default: rcl_fast_gpu in the temporary folder
set -euo pipefail
PYTHON=$(command -v "${PYTHON:-python3}") || { echo "gpu.sh: no Python named ${PYTHON:-python3}" >&2; exit 2; }
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export SCRATCH=${SCRATCH:-${TMPDIR:-/tmp}/rcl_fast_gpu} PYTHONUNBUFFERED=1
export PYTHONSAFEPATH=1 # Python looks into the current folder first, and rcl_fast/ here lacks the kernels
mkdir -p "$SCRATCH"
SCRATCH=$(realpath "$SCRATCH")
bash "$here/import_tree.sh" "$SCRATCH/import"
export PYTHONPATH="$SCRATCH/import:$SCRATCH/site${PYTHONPATH:+:$PYTHONPATH}"
if [[ -n ${WHEELS:-} ]]; then # without what they need: pip does not look at what is installed, and would want PyTorch too
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$SCRATCH/site" \
    --root-user-action ignore "$WHEELS"/*.whl || echo "gpu.sh: the wheels of $WHEELS could not be installed" >&2
elif [[ -f ${TRAVEL:-}/packages.tar.xz ]]; then
  "$PYTHON" -m tarfile --extract "$TRAVEL/packages.tar.xz" "$SCRATCH/site" ||
    echo "gpu.sh: $TRAVEL/packages.tar.xz could not be unpacked" >&2
fi
exec "$PYTHON" -m bench.gpu "$@"
