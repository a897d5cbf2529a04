#!/usr/bin/env bash
# One command for a machine with an NVIDIA GPU and no network: builds in place, runs the C++ tests and every op on the device,
# the op contract under compute-sanitizer, and measures. Needs Python, torch with CUDA, nvcc, ninja, CMake, pybind11, pytest.
#
#     scripts/gpu.sh [folder for results, default benchmarks/results]
set -euo pipefail
cd "$(dirname "$0")/.."
results=${1:-benchmarks/results}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
began=$SECONDS
step() { printf '\n=== %s (%d s)\n' "$1" $((SECONDS - began)); }

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

step "C++ tests"
cmake -S . -B "$work/cpp" -G Ninja -DDDPP_TESTS=ON -DDDPP_BUILD_CUDA=0 > "$work/cmake.log" || { cat "$work/cmake.log"; exit 1; }
cmake --build "$work/cpp" > "$work/make.log" || { tail -50 "$work/make.log"; exit 1; }
ctest --test-dir "$work/cpp" --output-on-failure

step "every op on the device"
DDPP_REQUIRE_BACKENDS=reference,compiled,cuda python -m pytest -q -p no:cacheprovider \
  tests/test_op_contract.py tests/test_ops_match_loss.py tests/test_ops_dsa.py tests/test_ops_norm_pool.py

if command -v compute-sanitizer > /dev/null; then
  # The contract's gradients and values touch every kernel; a sanitizer makes each launch tens of times slower.
  for tool in memcheck racecheck initcheck synccheck; do
    step "compute-sanitizer $tool"
    timeout 120 compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
      python -m pytest -q -x -p no:cacheprovider tests/test_op_contract.py -k "cuda and value_and_gradient" \
      || { echo "gpu.sh: $tool found an error, or took longer than 120 s"; exit 1; }
  done
else
  echo "gpu.sh: compute-sanitizer is not on PATH, kernels were not sanitized"
fi

step "measure"
mkdir -p "$results"
out=$results/$(date +%F)-$device
(cd benchmarks && python gpu.py --out "$work/result.json") | tee "$work/table.md"
cp "$work/result.json" "$out.json"
cp "$work/table.md" "$out.md"
step "done: $out.json and $out.md"
