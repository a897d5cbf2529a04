#!/usr/bin/env bash
# The whole job on CIFAR-10, from a folder of images to accuracies: ZCA, 100 teachers, one image a class by DDPP and by MTT from
# the same seed and teachers, five networks on each. Run again with the same words after it was cut, it goes on
# where it stopped: a teacher after its last epoch, distillation from its checkpoint, an evaluation after its last network.
#
#     scripts/cifar10.sh DATA_ROOT OUT [options of ddpp.distill for both methods, such as --tf32]
#
# DATA_ROOT holds train/<class>/ and test/<class>/. IPC=10 in the environment takes another preset, which reads 21 epochs of its
# teachers and not 3; --teachers-count 20 trains fewer. Kernels that are not compiled yet are, in place.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 2; }
data=$(realpath "$1") out=$(realpath -m "$2")
shift 2
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PATH=$PATH:/usr/local/cuda/bin
python=$(command -v python3 || command -v python) || { echo "cifar10.sh: there is no Python on PATH"; exit 2; }
library=_cpu
command -v nvcc > /dev/null && library=_cuda
ls ddpp/$library.*so > /dev/null 2>&1 || "$python" setup.py build_ext --inplace > /dev/null ||
  echo "cifar10.sh: the kernels were not compiled; it goes on in pure PyTorch, which is slower"

for method in ddpp mtt; do
  run=$out/$method resume=
  [ -f "$run/results.json" ] && continue
  [ -f "$run/config.toml" ] && resume=--resume
  "$python" -m ddpp.distill --preset "ddpp-cifar10-ipc${IPC:-1}" --dataset folder --data-root "$data" --method $method \
    --teachers-folder "$out/teachers" --evaluate-full-epochs 0 "$@" --out "$run" $resume
done
"$python" -m ddpp.compare --first "$out/mtt" --second "$out/ddpp" --json "$out/difference.json"
"$python" - "$out" <<'PY'
import json, sys
for method in ("ddpp", "mtt"):
    found = json.load(open(f"{sys.argv[1]}/{method}/results.json"))
    accuracy, seconds = found["accuracy"], {name: round(s) for name, s in found["seconds"].items()}
    print(f"{method}: {accuracy[method]['mean']:.1f} ± {accuracy[method]['std']:.1f} %, random real images "
          f"{accuracy['random']['mean']:.1f} %; seconds {seconds}")
PY
