#!/usr/bin/env bash
# What docs/benchmarks.md still lacks from a GPU, what is worth most first, as one run of at most eight minutes. Run it
# from the repository's root, in an environment with torch (CUDA), triton, transformers, accelerate, safetensors and
# pytest; columns of Humming and gemlite come along where humming-kernels and gemlite are installed.
#
#   bash docs/measure-on-gpu.sh results               # results go to this folder
#   bash docs/measure-on-gpu.sh results               # again: what is there is skipped, what is not is done
#   BUDGET=1200 bash docs/measure-on-gpu.sh results   # seconds from the start; limits of the steps grow with it
#   SMALL=1 bash docs/measure-on-gpu.sh results       # the same commands with tiny models, to try them on a CPU
#
# A step has a limit, and begins only if what is left suffices for a sensible part of it. Its result gets its name by a
# rename after it has succeeded; until then it is NAME.part. The status is 1 if a step failed, otherwise 2 if one is left.
# A folder belongs to one device; take another one when the code has changed, too.
set -uo pipefail # a step that fails must not keep the others from running: its log says why
out="${1:?name a folder for the results}"
budget="${BUDGET:-480}"
usual=480
grace=5 # seconds between the signal that asks a step to end and the one that ends it
SECONDS=0
device=small # tests for a GPU would pass by being skipped, so that without SMALL there must be one
if [ -z "${SMALL:-}" ]; then
  device="$(python -c 'import torch; print(torch.cuda.get_device_name())')"
  if [ -z "$device" ]; then
    echo "torch sees no GPU; SMALL=1 tries the commands without one" >&2
    exit 1
  fi
fi
mkdir -p "$out" || exit 1
if [ -e "$out/device.txt" ] && [ "$(<"$out/device.txt")" != "$device" ]; then
  echo "$out has results of '$(<"$out/device.txt")', not of '$device'; name another folder" >&2
  exit 1
fi
echo "$device" >"$out/device.txt"
out="$(cd "$out" && pwd)"
export PYTHONPATH="$PWD:$PWD/kernels/torch-ext${PYTHONPATH:+:$PYTHONPATH}"
# what is compiled and tuned is kept for the next run too
export SAB_KERNELS_CACHE="$out/tuned" HUMMING_CACHE_DIR="$out/humming"
summary=() failed=0 left=0

say() {
  summary+=("$(printf '%-18s %s' "$1" "$2")")
  echo "== $1: $2"
}

step() { # RESULT LEAST LIMIT COMMAND…: seconds without which it does not begin, and that it may take of the usual budget
  local result="$1" least="$2" limit="$3" rest began status
  shift 3
  if [ -e "$out/$result" ]; then
    say "$result" "there already"
    return
  fi
  rest=$((budget - SECONDS - grace))
  if [ "$rest" -lt "$least" ]; then
    say "$result" "left for another run: it takes $least s at least, and $((rest > 0 ? rest : 0)) s are left"
    left=1
    return
  fi
  [ "$budget" -gt "$usual" ] && limit=$((limit * budget / usual))
  [ "$limit" -gt "$rest" ] && limit="$rest"
  echo "== $result, at most $limit s: $*"
  began="$SECONDS"
  timeout --kill-after="$grace" "$limit" "$@" >"$out/$result.part" 2>"$out/$result.log"
  status="$?"
  if [ "$status" -eq 0 ] && mv "$out/$result.part" "$out/$result"; then
    say "$result" "done in $((SECONDS - began)) s"
  elif [ "$status" -eq 124 ] || [ "$status" -eq 137 ]; then
    say "$result" "cut after $limit s, left for another run"
    left=1
  else
    say "$result" "FAILED with status $status after $((SECONDS - began)) s"
    tail -n 15 "$out/$result.part" "$out/$result.log"
    failed=1
  fi
}

sab() { # NAME LEAST LIMIT ARGUMENTS…: the command line without an installation
  local name="$1" least="$2" limit="$3"
  shift 3
  step "$name.json" "$least" "$limit" python -m optimum_sab.cli.main "$@"
}

installed() { # importing either would start compilers, or ask for a GPU
  python -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)" 2>/dev/null
}

help="$(python -m optimum_sab.cli.main bench kernels --help 2>/dev/null)"
known() { # whether the benchmark of kernels knows an option or a shape
  grep -q -e "$1" <<<"$help"
}

gate7=18944x3584 down7=3584x18944 gate72=29568x8192 down72=8192x29568
model7=qwen2.5-vl-7b model72=qwen2.5-vl-72b size7=7b size8=8b size32=32b block=7b-block
quantized=(--samples 64 --length 2048 --dtype bfloat16)
experts30=qwen3-30b-a3b experts235=qwen3-235b-a22b solved=(--experts 32)
decode=(1 4 16 64) many=(256 1024 4096) repeats=20 new=64 prompt=512
if [ -n "${SMALL:-}" ]; then
  gate7=256x128 down7=128x256 gate72=384x128 down72=128x384
  model7=256x256 model72=256x384 size7=tiny size8=tiny-qwen3 size32=tiny-qwen3 block=tiny
  experts30=4x2x128x64 experts235=8x2x256x96 solved=(--experts 3 --tokens 64)
  quantized=(--samples 4 --length 32 --dtype bfloat16)
  decode=(1 4) many=(16) repeats=2 new=4 prompt=16
fi
timed=(--repeats "$repeats" --json)
generated=(--new-tokens "$new" --prompt-tokens "$prompt" --json)
tests=(python -m pytest -q -m gpu -p no:cacheprovider)

# Are the kernels right?
sab env 3 60 env --json
step tests-kernels.txt 20 100 "${tests[@]}" tests/kernels --ignore tests/kernels/test_experts.py

# Decode: ours against cuBLAS, then against other packages, then coded
sab decode-7b 15 60 bench kernels --shapes "$gate7" "$down7" --tokens "${decode[@]}" "${timed[@]}"
sab decode-72b 15 60 bench kernels --shapes "$gate72" "$down72" --tokens "${decode[@]}" "${timed[@]}"
if installed humming; then
  sab humming-7b 30 90 bench kernels --shapes "$gate7" "$down7" --tokens "${decode[@]}" --humming "${timed[@]}"
  sab humming-72b 30 90 bench kernels --shapes "$gate72" "$down72" --tokens "${decode[@]}" --humming "${timed[@]}"
else
  say humming "not installed, left out"
fi
if installed gemlite; then # it tunes every number of tokens for long, so the limits are tight and the runs are single
  sab gemlite-7b-1 30 60 bench kernels --shapes "$gate7" --tokens 1 --gemlite "${timed[@]}"
  sab gemlite-7b-64 30 60 bench kernels --shapes "$gate7" --tokens 64 --gemlite "${timed[@]}"
else
  say gemlite "not installed, left out"
fi
if known --code; then
  sab coded-7b 15 60 bench kernels --shapes "$gate7" "$down7" --tokens "${decode[@]}" --code trellis16 "${timed[@]}"
  sab coded-72b 15 60 bench kernels --shapes "$gate72" "$down72" --tokens "${decode[@]}" --code trellis16 "${timed[@]}"
fi

# Experts: right, then decode and many tokens against the fastest dense implementation in Transformers
if known qwen3-30b-a3b; then
  step tests-experts.txt 20 70 "${tests[@]}" tests/kernels/test_experts.py
  sab experts-30b 25 70 bench kernels --shapes "$experts30" --tokens "${decode[@]}" "${timed[@]}"
  sab experts-30b-many 25 70 bench kernels --shapes "$experts30" --tokens "${many[@]}" "${timed[@]}"
fi

# Whole models: 1.9 times dense at 8B and 2.6 times at 32B are to be beaten
sab generate-8b 30 70 bench generate --size "$size8" "${generated[@]}"
sab generate-32b 45 100 bench generate --size "$size32" "${generated[@]}"
sab generate-7b 30 70 bench generate --size "$size7" "${generated[@]}"

# Quantizing
sab quantize-7b-block 45 150 bench quantize --size "$block" "${quantized[@]}" --json
sab solve-experts 30 100 bench solve-experts --shapes "$experts30" "${solved[@]}" --json

# The rest: all linears at many tokens, the paper's settings, steps without a graph, other tests, tuning
sab many-7b 20 60 bench kernels --shapes "$model7" --tokens "${many[@]}" "${timed[@]}"
sab many-72b 20 60 bench kernels --shapes "$model72" --tokens "${many[@]}" "${timed[@]}"
if known qwen3-30b-a3b; then
  sab experts-235b 25 70 bench kernels --shapes "$experts235" --tokens "${decode[@]}" "${many[@]}" "${timed[@]}"
  sab experts-30b-coded 25 70 bench kernels --shapes "$experts30" --tokens "${decode[@]}" --code trellis16 "${timed[@]}"
fi
sab paper-7b 20 60 bench kernels --shapes "$model7" --preset paper --tokens 1 16 256 "${timed[@]}"
sab generate-7b-eager 30 60 bench generate --size "$size7" --no-cuda-graphs --new-tokens 4 --json
step tests-rest.txt 30 120 "${tests[@]}" tests/ops tests/nn tests/bench
export SAB_KERNELS_AUTOTUNE=1
sab tuned-7b 45 150 bench kernels --shapes "$gate7" "$down7" --tokens "${decode[@]}" "${timed[@]}"
sab tuned-72b 45 150 bench kernels --shapes "$gate72" "$down72" --tokens "${decode[@]}" "${timed[@]}"
if known qwen3-30b-a3b; then
  sab tuned-experts 45 150 bench kernels --shapes "$experts30" --tokens "${decode[@]}" "${many[@]}" "${timed[@]}"
fi

printf '%s\n' "" "${summary[@]}" | tee "$out/summary.txt"
echo "$SECONDS s of $budget"
[ "$failed" -eq 0 ] || exit 1
[ "$left" -eq 0 ] || exit 2
