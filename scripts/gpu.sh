#!/usr/bin/env bash
# One command for a machine with an NVIDIA GPU and no network, in less than eight minutes: builds in place, runs the C++ tests,
# measures, runs every op and every stage on the device, and the C++ tests of the kernels and the op contract under
# compute-sanitizer. Needs Python, torch with CUDA, nvcc, ninja, CMake, pybind11, pytest, pytest-benchmark.
#
#     scripts/gpu.sh [folder for results, default benchmarks/results]
#
# A step that fails or takes too long does not keep the others from running; the exit code is then 1.
set -euo pipefail
cd "$(dirname "$0")/.."
results=${1:-benchmarks/results}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
began=$SECONDS
failures=()
step() { printf '\n=== %s (%d s)\n' "$1" $((SECONDS - began)); }
try() {  # seconds at most, command
  local limit=$1 left=$((470 - SECONDS + began))
  shift
  [ "$left" -lt "$limit" ] && limit=$left
  [ "$limit" -gt 0 ] && timeout "$limit" "$@" && return
  echo "gpu.sh: failed, or took longer than $limit s: $*"
  failures+=("$*")
}

python - <<'PY' || { echo "gpu.sh: torch sees no CUDA device here; the tests of .ci/run do without one"; exit 2; }
import sys, torch
sys.exit(not torch.cuda.is_available())
PY
command -v nvcc > /dev/null || { echo "gpu.sh: nvcc is not on PATH"; exit 2; }
capability=$(python -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
device=$(python -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))')

step "build in place for $capability"
TORCH_CUDA_ARCH_LIST="$capability" DDPP_BUILD_CUDA=1 python setup.py build_ext --inplace > "$work/build.log" 2>&1 \
  || { tail -50 "$work/build.log"; exit 1; }
export PYTHONPATH=$PWD
python -m ddpp.info

step "C++ tests, the kernels' on the device among them"
cmake -S . -B "$work/cpp" -G Ninja -DDDPP_TESTS=ON -DDDPP_BUILD_CUDA=1 -DCMAKE_CUDA_ARCHITECTURES="${capability/./}" \
  > "$work/cmake.log" || { cat "$work/cmake.log"; exit 1; }
cmake --build "$work/cpp" > "$work/make.log" || { tail -50 "$work/make.log"; exit 1; }
try 90 ctest --test-dir "$work/cpp" --output-on-failure -j "$(nproc)"

step "measure"
mkdir -p "$results"
out=$results/$(date +%F)-$device
try 200 bash -c "cd benchmarks && python gpu.py --out '$work/result.json' > '$work/table.md'"
cat "$work/table.md"
if [ -f "$work/result.json" ]; then
  cp "$work/result.json" "$out.json"
  cp "$work/table.md" "$out.md"
  echo "written: $out.json and $out.md"
fi

step "every op, captured inner steps, and every stage, on the device"
try 150 env DDPP_REQUIRE_BACKENDS=cuda python -m pytest -q -p no:cacheprovider -k "cuda or test_gpu" tests/test_op_contract.py \
  tests/test_ops_*.py tests/test_gpu.py tests/test_stand_in.py

if command -v compute-sanitizer > /dev/null; then
  sanitize() { try "$1" compute-sanitizer --tool "$2" --error-exitcode 1 --target-processes all "${@:3}"; }
  for tool in memcheck racecheck synccheck; do
    step "compute-sanitizer $tool over the C++ tests"
    for test in "$work"/cpp/test_*_device; do sanitize 30 $tool "$test"; done
  done
  # The C++ tests' memory is shared with the host, whose writes initcheck does not see. Here each tensor is an allocation of its
  # own. Many of torch's own kernels run as well, and each is made tens of times slower: tests that touch every kernel.
  step "compute-sanitizer initcheck over the op contract"
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 sanitize 90 initcheck \
    python -m pytest -q -x -p no:cacheprovider tests/test_op_contract.py -k "cuda and (value_and_gradient or beyond_the_last)"
else
  echo "gpu.sh: compute-sanitizer is not on PATH, kernels were not sanitized"
fi

step "done"
[ ${#failures[@]} -eq 0 ] || { printf 'gpu.sh: failed: %s\n' "${failures[@]}"; exit 1; }
