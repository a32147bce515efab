#!/usr/bin/env bash
# All that one lent GPU is to show, in under an hour: the kernels' tests, the seed space's speed, and a round of FedKSeed,
# of the seed-space gradient and of FedCyBGD (two turns) on a random model of 1, 3 or 7 billion parameters in bfloat16.
#
#     benchmarks/gpu.sh [--billions 1|3|7] [--device cuda] [--out benchmarks/results/gpu]
#     benchmarks/gpu.sh --tiny [--out FOLDER]     # the same on a CPU in a minute, to try the script
#
# Each part is a process with a limit, so that one that fails leaves the others; its output is OUT/NAME.txt. The rounds
# are lines of OUT/rounds.jsonl. Exit code 1 where a part failed.
set -u
cd "$(dirname "$0")/.."
billions=1 device=cuda out=benchmarks/results/gpu tiny=
while [ $# -gt 0 ]; do
  case $1 in
    --billions) billions=$2; shift 2 ;;
    --device) device=$2; shift 2 ;;
    --out) out=$2; shift 2 ;;
    --tiny) tiny=1 billions=0 device=cpu; shift ;;
    *) sed -n '2,9p' "$0" >&2; exit 2 ;;
  esac
done
python=${PYTHON:-.venv/bin/python}
mkdir -p "$out"
failed=0

part() { # NAME SECONDS COMMAND…
  local name=$1 limit=$2; shift 2
  echo "== $name"
  timeout "$limit" "$@" > "$out/$name.txt" 2>&1
  local code=$?
  tail -n 3 "$out/$name.txt"
  [ $code -eq 0 ] || { echo "$name: exit code $code" | tee -a "$out/failed.txt"; failed=1; }
}

rm -f "$out/failed.txt" "$out/rounds.jsonl"
if [ -n "$tiny" ]; then
  "$python" -c 'import triton' 2>/dev/null && part kernels 300 env TRITON_INTERPRET=1 "$python" -m pytest -q tests/seed_space/test_cuda.py -k "walsh_has_the_bits and 1-16-32"
  part speed 120 "$python" benchmarks/seed_space.py --parameters 7e6 --sizes 1024 --repeats 1
else
  part machine 30 nvidia-smi
  part kernels 900 "$python" -m pytest -q tests/seed_space/test_cuda.py
  part speed 600 "$python" benchmarks/seed_space.py --device "$device" --parameters 1e9
fi
model=$(mktemp -d)
trap 'rm -rf "$model"' EXIT
part model 900 "$python" benchmarks/large_rounds.py write "$model/model" --billions "$billions" --device "$device"
for method in fedkseed gradient fedcybgd; do
  part "$method" 900 "$python" benchmarks/large_rounds.py round "$model/model" --method "$method" --device "$device" \
    --results "$out/rounds.jsonl" ${tiny:+--tokens 64}
done
exit $failed
