#!/usr/bin/env bash
# Everything that a rented GPU machine is to be asked, on this one without its GPU: a copy of the checkout without git and
# of what travels with each call, the machine's packages and no more (make test-gpu-stack makes them), each call as it will be
# sent, with --dry-run. It holds what the machine's lender allows, which the options say; the exit status is 1 where
# anything does not fit, a part is not passed, or a row is not well formed.
#
#   bench/travel.sh build/travel && bench/rehearse.sh --travel build/travel --travels-mb 64 --files 8 --file-mb 16
#
#   --travel FOLDER       what bench/travel.sh filled (default: build/travel)
#   --travels-mb N        MiB that travel with a command, 16 MiB of what came back on top (default: 64)
#   --files N             files that come back from a command (default: 8)
#   --file-mb N           MiB of each (default: 16)
#   --returns-mb N        MiB of them together (default: 64)
#   --folders N           folders that they may lie deep (default: 2)
#   --seconds N           of a command (default: 600)
#   --characters N        of a command's text (default: 2000)
#   --only NUMBER         one call of the queue alone
set -euo pipefail

travel=build/travel travels_mb=64 files=8 file_mb=16 returns_mb=64 folders=2 seconds=600 characters=2000 only=
while [[ $# -gt 0 ]]; do
  [[ $# -ge 2 && $1 =~ ^--(travel|travels-mb|files|file-mb|returns-mb|folders|seconds|characters|only)$ ]] ||
    { sed -n '2,19s/^# \{0,1\}//p' "$0"; exit 2; }
  name=${1#--}
  declare "${name//-/_}=$2"
  shift 2
done

# The queue: a number, the parts, the seconds of their budget, and what travels beside the packages and the commit.
queue=(
  "1 gate+speed+profile+captured 540 bcl.py supcontrast.py" # right, and fast
  "2 cifar1 345 cifar100_lt.tar"                            # the first real accuracy
  "3 table1 540 cifar100_lt.tar"
  "4 table2 540 cifar10_lt.tar"
  "4 compression 540 cifar100_lt.tar"
  "5 tune 420"
  "6 dali+step+data 540 cifar100_lt.tar"
)

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv-gpu-stack/bin/python
[[ -x $python ]] || { echo "rehearse.sh: no .venv-gpu-stack: make rehearse makes it" >&2; exit 2; }
[[ -d $travel ]] || { echo "rehearse.sh: no folder $travel: bench/travel.sh $travel fills it" >&2; exit 2; }
travel=$(realpath "$travel")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=()
fits() { # WHAT IS MOST
  echo "   $1: $2 of at most $3"
  [[ $2 -le $3 ]] || failed+=("$1: $2, and at most $3 are allowed")
}

mkdir -p "$work/checkout/build"
git -C "$root" ls-files -z --cached --others --exclude-standard |
  (cd "$root" && tar --null --files-from - --ignore-failed-read --create 2> "$work/deleted") | tar -x -C "$work/checkout"
cd "$work/checkout"

for call in "${queue[@]}"; do
  read -r number parts budget things <<< "$call"
  [[ -z $only || $only == "$number" ]] || continue
  command="TRAVEL=build/travel bash bench/gpu.sh \$OUT $parts --budget $budget"
  printf '\n%s. %s\n' "$number" "$command"
  export OUT=$work/out
  rm -rf "$OUT" "$work/scratch" build/travel
  mkdir "$OUT" build/travel
  for thing in packages.tar.xz commit $things; do cp -r "$travel/$thing" build/travel/ || failed+=("call $number: no $thing travels"); done
  fits "MiB that travel, with 16 of runs or caches" $(($(du -sb --apparent-size . | cut -f1) / 2 ** 20 + 1 + 16)) "$travels_mb"
  began=$SECONDS
  env --unset RCL_COMMIT PYTHON="$python" SCRATCH="$work/scratch" bash -c "$command --dry-run" > "$work/log" 2>&1 ||
    failed+=("call $number, $parts: exit status $?")
  grep -E '^(==|gpu.sh)' "$work/log" | sed 's/^/   /' || true
  grep -qE '^== .*: (red|late|left out)' "$work/log" && tail -30 "$work/log"
  fits "seconds of the rehearsal" $((SECONDS - began)) "$seconds"
  fits "seconds of the budget" "$budget" "$seconds"
  fits "characters of the command" ${#command} "$characters"
  fits "files that come back" "$(find "$OUT" -type f | wc -l)" "$files"
  fits "MiB of the largest" "$(find "$OUT" -type f -printf '%s\n' | sort -n | tail -1 | awk '{print int($1 / 2^20) + 1}')" "$file_mb"
  fits "MiB together" "$(($(du -sb --apparent-size "$OUT" | cut -f1) / 2 ** 20 + 1))" "$returns_mb"
  fits "folders deep" "$(find "$OUT" -type f -printf '%d\n' | sort -n | tail -1 | awk '{print $1 - 1}')" "$folders"
  odd=$(find "$OUT" -mindepth 1 -printf '%f\n' | grep -vE '^[A-Za-z0-9._-]+$' || true)
  [[ -z $odd ]] || failed+=("call $number: names with other characters: $odd")
  find "$OUT" -type f -printf '   %f  %s bytes\n'
  PYTHONSAFEPATH=1 PYTHONPATH=$work/scratch/import "$python" -m bench.rows "$OUT"/*.jsonl || failed+=("call $number: rows that are not well formed")
done

printf '\n'
[[ ${#failed[@]} == 0 ]] || { printf 'rehearse.sh: %s\n' "${failed[@]}" >&2; exit 1; }
echo "rehearsed: every part passed, and everything fits"
