#!/usr/bin/env bash
# What nobody has tried yet: the scripts on a GPU. Tests, TRL, speed and memory, as one table to paste.
#
#     benchmarks/gpu.sh --model FOLDER                 # on a machine with a GPU
#     benchmarks/gpu.sh --device cpu                   # the toy, on a CPU: does the command itself work?
set -eu
cd "$(dirname "$0")/.."
exec "${PYTHON:-python}" benchmarks/gpu.py "$@"
