#!/usr/bin/env bash
# Proof on a CUDA GPU: all tests of the loss, its speed, its memory; then the loaders, the trainer and its whole step.
# The first three end within ten minutes, the others within eight more. PyTorch's image suffices, without network.
#
#   bench/gpu.sh OUT                                all but cifar and table1; a failing test stops it
#   bench/gpu.sh OUT gate|speed|memory|data|step    one part
#   bench/gpu.sh OUT cifar                          CIFAR-100-LT in whole steps, and whole runs, alone and three at once
#   bench/gpu.sh OUT table1                         table 1's CIFAR-100-LT, 3 seeds, 590 s a call: the same one goes on
#   bench/gpu.sh OUT [PART] --dry-run               any machine: proves this script, keeps no figure
#
# OUT gets gate.log, and PART.jsonl of each other part. Set in the environment, where you have them:
#   BCL=loss/contrastive.py of BCL's repository, SUPCONTRAST=losses.py of SupContrast's: published code to compare with
#   CIFAR=folder of cifar100_lt, JPEGS=folder of JPEG files below class folders: without them images are made up
#   PYTHON=python3     WHEELS=folder of `pip download pytest hypothesis '.[train]'`, for an image without them
set -euo pipefail

usage() { sed -n '2,15s/^# \{0,1\}//p' "$0"; exit 2; }

[[ $# -ge 1 && $1 != -* ]] || usage
mkdir -p "$1"
OUT=$(cd "$1" && pwd)
shift
PART=all DRY=
for argument in "$@"; do
  case $argument in
    gate | speed | memory | data | step | cifar | table1) PART=$argument ;;
    --dry-run) DRY=--dry-run ;;
    *) usage ;;
  esac
done

PYTHON=$(command -v "${PYTHON:-python3}")
[[ $PYTHON == /* ]] || PYTHON=$PWD/$PYTHON
[[ -z ${WHEELS:-} ]] || WHEELS=$(realpath "$WHEELS")
PEERS=()
for peer in BCL SUPCONTRAST; do
  [[ -z ${!peer:-} ]] || PEERS+=("--${peer,,}" "$(realpath "${!peer}")")
done
for images in CIFAR JPEGS; do
  [[ -z ${!images:-} ]] || declare "$images=$(realpath "${!images}")"
done
cd "$(dirname "$0")/.."
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT

# The packages under the names that users import, without installing anything.
mkdir -p "$WORK/import/rcl_fast"
ln -s "$PWD"/rcl_fast/* "$PWD"/kernels "$PWD"/train "$WORK/import/rcl_fast/"
export PYTHONPATH="$WORK/import${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

if ! "$PYTHON" -c 'import torch' 2> "$WORK/import.log"; then
  echo "gpu.sh: $PYTHON has no PyTorch; name one that has it: PYTHON=.venv/bin/python bench/gpu.sh ..." >&2
  exit 1
fi
if [[ -z $DRY ]] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu.sh: PyTorch ($PYTHON) sees no CUDA device; --dry-run proves the script without one" >&2
  exit 1
fi

has() { "$PYTHON" -c "import $1" 2> "$WORK/import.log"; }

bring() { # PACKAGE...: from WHEELS, where they are missing
  local names="${*/%/,}"
  has "${names%,}" || [[ -z ${WHEELS:-} ]] ||
    "$PYTHON" -m pip install --quiet --no-index --find-links "$WHEELS" --target "$WORK/import" "$@"
  has "${names%,}"
}

# Without the current folder on the path, where rcl_fast/ lacks the kernels.
PYTEST=("$PYTHON" -c 'import sys; del sys.path[0]; import pytest; sys.exit(pytest.main(sys.argv[1:]))')

# Real compilation takes most of the time: the tests are dealt to as many processes as there are cores, up to 16.
gate() {
  if ! bring pytest hypothesis; then
    echo "gate: no pytest and hypothesis here (WHEELS=folder brings them): the shipped configurations only"
    [[ -n $DRY ]] || timeout 270 "$PYTHON" tests/kernels/shipped.py
    return
  fi
  "${PYTEST[@]}" --collect-only -q tests/rcl_fast tests/kernels | grep '^tests/.*::' > "$WORK/tests"
  local shards=$(($(nproc) < 16 ? $(nproc) : 16)) processes=() failed=0
  split --number="r/$shards" "$WORK/tests" "$WORK/shard."
  for shard in "$WORK"/shard.*; do
    timeout 270 "${PYTEST[@]}" -q ${DRY:+--collect-only} "@$shard" > "$shard.log" 2>&1 &
    processes+=($!)
  done
  for process in "${processes[@]}"; do wait "$process" || failed=1; done
  cat "$WORK"/shard.*.log > "$WORK/all"
  grep -E '^(FAILED|ERROR|SKIPPED)|^E  ' "$WORK/all" || true
  grep -hE '^[0-9=].*(passed|failed|error|collected)' "$WORK/all" || true
  echo "gate: $(wc -l < "$WORK/tests") tests in $shards processes, $([[ $failed == 0 ]] && echo passed || echo FAILED)"
  return "$failed"
}

measure() { # PART SECONDS
  timeout "$2" "$PYTHON" bench/gpu_loss.py "$1" --output "$OUT/$1.jsonl" $DRY "${PEERS[@]}"
}

bring_the_trainer() { # PART
  bring tyro rich tensorboard plotly jinja2 timm && has torchvision && has sklearn && return
  echo "$1: left out, as tyro, rich, tensorboard, plotly, jinja2 or timm is missing (WHEELS=folder brings them)," \
    "or torchvision or scikit-learn, which come with PyTorch's image or not"
  return 1
}

# The loaders alone, then the trainer: with what they bring, and with noise.
data() {
  bring_the_trainer data || return 0
  local images=() part
  [[ -z ${CIFAR:-} ]] || images+=(--cifar "$CIFAR")
  [[ -z ${JPEGS:-} ]] || images+=(--jpegs "$JPEGS")
  for part in "" --train; do
    timeout 120 "$PYTHON" bench/data.py $part "${images[@]}" --workers "$(nproc)" --output "$OUT/data.jsonl" $DRY
  done
}

# The paper's main job, beside a plain loop of BCL's kind.
step() {
  bring_the_trainer step || return 0
  local images=()
  [[ -z ${JPEGS:-} ]] || images=(--data "$JPEGS")
  timeout 240 "$PYTHON" bench/step.py "${images[@]}" --rounds 3 --steps 5 --workers "$(nproc)" \
    --output "$OUT/step.jsonl" $DRY
}

cifar() {
  bring_the_trainer cifar || return 0
  [[ -n $DRY ]] || : "${CIFAR:?name the folder of cifar100_lt}"
  if bring pytest hypothesis; then  # a graph that no test has compared is not worth a figure
    timeout 270 "${PYTEST[@]}" -q -m gpu ${DRY:+--collect-only} tests/train/test_whole_step.py
  fi
  timeout 200 "$PYTHON" bench/cifar.py --ways plain graph_compiled --seeds 1 --epochs 5 \
    ${CIFAR:+--data "$CIFAR"} --output "$OUT/cifar.jsonl" $DRY
  timeout 400 "$PYTHON" bench/cifar.py --ways graph_compiled --seeds 1 --at-once 1 3 \
    ${CIFAR:+--data "$CIFAR"} --output "$OUT/cifar.jsonl" $DRY
  timeout 300 "$PYTHON" bench/step.py --arch resnet32 --rounds 3 --workers "$(nproc)" \
    --output "$OUT/cifar_step.jsonl" $DRY
}

table1() {
  bring_the_trainer table1 || return 0
  local setting=(--dataset digits_lt --epochs 1 --seeds 1 --only BCL+RCL)
  [[ -n $DRY ]] || setting=(
    --dataset cifar100_lt --data "${CIFAR:?name the folder of cifar100_lt}" --jobs-per-device "${JOBS:-3}"
    --more="--cuda-graph --compile"
  )
  timeout 590 "$PYTHON" train/reproduce.py table1 "${setting[@]}" --folder "$OUT/runs" --output "$OUT/table1"
}

began=$SECONDS
[[ $PART != all && $PART != gate ]] || gate 2>&1 | tee "$OUT/gate.log"
[[ $PART != all && $PART != speed ]] || measure speed 240
[[ $PART != all && $PART != memory ]] || measure memory 80
[[ $PART != all && $PART != data ]] || data
[[ $PART != all && $PART != step ]] || step
[[ $PART != cifar ]] || cifar
[[ $PART != table1 ]] || table1
echo "gpu.sh: $PART done in $((SECONDS - began)) s; rows in $OUT"
