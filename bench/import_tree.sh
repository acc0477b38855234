#!/usr/bin/env bash
# The packages under the names that users import, without installing anything: makes FOLDER/rcl_fast and FOLDER/bench,
# of links.
#   bench/import_tree.sh FOLDER      then PYTHONPATH=FOLDER, or a type checker told to look there
set -euo pipefail
[[ $# == 1 ]] || { sed -n '2,4s/^# \{0,1\}//p' "$0"; exit 2; }
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
rm -rf "$1/rcl_fast" "$1/bench"
mkdir -p "$1/rcl_fast"
ln -s "$root"/rcl_fast/* "$root/kernels" "$root/train" "$1/rcl_fast/"
ln -s "$root/bench" "$1/bench"
