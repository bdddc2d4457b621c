#!/usr/bin/env bash
# Everything docs/benchmarks.md still lacks from a GPU, in the order of its list, as one run of about ten minutes on an
# H100 or H200. Run it from the repository's root, in an environment with torch (CUDA), triton, transformers, accelerate,
# safetensors and pytest. Results go to the folder named by the first argument.
#
#   bash docs/measure-on-gpu.sh results
set -uo pipefail # a step that fails must not keep the others from running: its log says why
out="${1:?name a folder for the results}"
mkdir -p "$out"
export PYTHONPATH="$PWD:$PWD/kernels/torch-ext${PYTHONPATH:+:$PYTHONPATH}" SAB_KERNELS_CACHE="$out/tuned"
failed=()

step() {
  local name="$1"
  shift
  echo "== $name: $*"
  SECONDS=0
  if timeout "${LIMIT:-300}" "$@" >"$out/$name.json" 2>"$out/$name.log"; then
    echo "   done in ${SECONDS} s"
  else
    echo "   FAILED with status $? after ${SECONDS} s; the end of its log:"
    tail -n 15 "$out/$name.log"
    failed+=("$name")
  fi
}

sab() { # the command line without an installation
  local name="$1"
  shift
  step "$name" python -m optimum_sab.cli.main "$@"
}

sab env env --json
step tests python -m pytest -q -m gpu -p no:cacheprovider tests/kernels tests/ops tests/nn tests/bench
sab kernels-7b bench kernels --shapes qwen2.5-vl-7b --json
sab kernels-72b bench kernels --shapes qwen2.5-vl-72b --json
sab kernels-paper bench kernels --shapes qwen2.5-vl-7b --preset paper --tokens 1 16 256 --json
sab generate-7b bench generate --size 7b --json
sab quantize-7b-block bench quantize --size 7b-block --samples 128 --length 2048 --dtype bfloat16 --json
sab generate-7b-eager bench generate --size 7b --no-cuda-graphs --new-tokens 16 --json
if python -c "import gemlite" 2>/dev/null; then
  sab gemlite bench kernels --shapes 18944x3584 29568x8192 --tokens 1 16 64 --dtype float16 --gemlite --json
else
  echo "== gemlite: not installed, left out"
fi
SAB_KERNELS_AUTOTUNE=1 sab kernels-7b-tuned bench kernels --shapes qwen2.5-vl-7b --json
SAB_KERNELS_AUTOTUNE=1 sab kernels-72b-tuned bench kernels --shapes qwen2.5-vl-72b --tokens 1 16 256 --json

if [ "${#failed[@]}" -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "all done"
