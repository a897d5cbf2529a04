#!/usr/bin/env bash
# One command for a machine with an NVIDIA GPU and no network, in less than eight minutes: builds in place, runs the C++ tests,
# measures, runs every op and every stage on the device, and the C++ tests of the kernels and the op contract under
# compute-sanitizer. Needs Python, torch with CUDA, nvcc, ninja, CMake, pybind11, pytest, pytest-benchmark.
#
#     scripts/gpu.sh [folder for results, default benchmarks/results]
#
# STEPS="cpp measure tests sanitize" in the environment chooses some of them; "search" is one more: outer steps and convolutions with
# the vendor's algorithms searched for each shape, in a process of its own. PARTS="norm_pool dsa" measures these rows of
# benchmarks/gpu.py alone, into files of their own. racecheck comes last and takes minutes: STEPS=sanitize is a call of its own where
# the whole leaves it no time. A step that fails or takes too long does not keep the others from running; the exit code is then 1.
set -euo pipefail
cd "$(dirname "$0")/.."
results=${1:-benchmarks/results}
steps=" ${STEPS:-cpp measure tests sanitize} "
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
began=$SECONDS
failures=()
step() { printf '\n=== %s (%d s)\n' "$1" $((SECONDS - began)); }
wanted() { [[ $steps == *" $1 "* ]]; }
try() {  # seconds at most, command; what does not heed an interrupt is killed
  local limit=$1 left=$((470 - SECONDS + began))
  shift
  [ "$left" -lt "$limit" ] && limit=$left
  [ "$limit" -gt 0 ] && timeout --signal=INT --kill-after=10 "$limit" "$@" && return
  echo "gpu.sh: failed, or took longer than $limit s: $*"
  failures+=("$*")
}

python=$(command -v python3 || command -v python) || { echo "gpu.sh: there is no Python on PATH"; exit 2; }
PATH=$(dirname "$("$python" -c 'import sys; print(sys.executable)')"):$PATH:/usr/local/cuda/bin
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
"$python" - <<'PY' || { echo "gpu.sh: torch sees no CUDA device here; the tests of .ci/run do without one"; exit 2; }
import sys, torch
sys.exit(not torch.cuda.is_available())
PY
command -v nvcc > /dev/null || { echo "gpu.sh: nvcc is neither on PATH nor in /usr/local/cuda/bin"; exit 2; }
capability=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
device=$("$python" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))')
out=$results/$(date +%F)-$device
mkdir -p "$results"
beside=()  # tests in several processes where pytest can
"$python" -c 'import xdist' 2> /dev/null && beside=(-n 8)

step "build in place for $capability, with the C++ tests"
TORCH_CUDA_ARCH_LIST="$capability" DDPP_BUILD_CUDA=1 CMAKE_ARGS="${CMAKE_ARGS:-} -DDDPP_TESTS=ON -DCMAKE_CUDA_FLAGS=-lineinfo" \
  "$python" setup.py build_ext --inplace > "$work/build.log" 2>&1 || { tail -50 "$work/build.log"; exit 1; }
cpp=build/cmake-$("$python" -c 'import sys; print(sys.implementation.cache_tag)')-cuda
"$python" -m ddpp.info

if wanted cpp; then
  step "C++ tests, the kernels' on the device among them"
  try 90 ctest --test-dir "$cpp" --output-on-failure -j "$(nproc)"
fi

measure() {  # seconds at most, end of the files' names, options of gpu.py
  local found=$work/result$2
  touch "$found.md"  # there may be no time left for it
  try "$1" bash -c "cd benchmarks && '$python' gpu.py --out '$found.json' ${*:3} > '$found.md'"
  cat "$found.md"
  [ -f "$found.json" ] || return 0
  cp "$found.json" "$out$2.json"
  cp "$found.md" "$out$2.md"
  echo "written: $out$2.json and $out$2.md"
}

if wanted measure; then
  step "measure"
  # shellcheck disable=SC2086
  measure 180 "${PARTS:+-${PARTS// /-}}" ${PARTS:+--parts $PARTS}
fi

if wanted tests; then
  step "every op, captured inner steps, and every stage, on the device"
  try 140 env DDPP_REQUIRE_BACKENDS=cuda "$python" -m pytest -q -p no:cacheprovider "${beside[@]}" -k "cuda or captured_on" \
    tests/test_op_contract.py tests/test_ops_*.py tests/test_gpu.py tests/test_stand_in.py
fi

if wanted sanitize && ! command -v compute-sanitizer > /dev/null; then
  failures+=("compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin")
elif wanted sanitize; then
  sanitize() { try "$1" compute-sanitizer --tool "$2" --error-exitcode 1 --target-processes all "${@:3}"; }
  # The C++ tests' memory is shared with the host, whose writes initcheck does not see. Here each tensor is an allocation of its
  # own, and not filled by torch, which would write it. Many of torch's own kernels run as well, and each is made tens of times
  # slower: tests that touch every kernel.
  step "compute-sanitizer initcheck over the op contract"
  DDPP_UNWRITTEN=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1 sanitize 90 initcheck \
    "$python" -m pytest -q -x -p no:cacheprovider tests/test_op_contract.py tests/test_ops_head.py \
    -k "cuda and (value_and_gradient or beyond_the_last or against_autograd)"
  over() {  # the C++ tests of these ops; those whose kernels no GPU has run yet come first
    for tool in memcheck synccheck racecheck; do
      step "compute-sanitizer $tool over the C++ tests of: $*"
      for op in "$@"; do sanitize 120 "$tool" "$cpp/test_${op}_device"; done
    done
  }
  over head dsa
  over match_loss norm_pool
fi

if wanted search; then
  step "measure, algorithms searched"
  measure 400 -searched --search
fi

step "done"
[ ${#failures[@]} -eq 0 ] || { printf 'gpu.sh: failed: %s\n' "${failures[@]}"; exit 1; }
