#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one command and under 9 minutes: builds, tests, checks memory, times.
# Wants CUDA's compiler, PyTorch 2.11 to 2.15 with its Triton, and what pyproject.toml asks for; no network.
#
#   bash benchmarks/gpu.sh [--out FOLDER] [--part "build tests sanitizer ops models"] [--seconds N]
#
# Two further parts, each to be given a run of its own: tune times every tile size and writes the table of winners;
# chain times whole training steps. Its plans take minutes of a CPU and no GPU: where FOLDER/plans.json has them, as
# `python -m benchmarks.gpu_chain --plans FOLDER/plans.json --only-plans` makes it on any machine, it does not.
set -u -o pipefail
cd "$(dirname "$0")/.."

out=runs/gpu
parts="build tests sanitizer ops models"
seconds=200
while [ $# -gt 0 ]; do
  case "$1" in
    --out) out=$2 ;;
    --part) parts=$2 ;;
    --seconds) seconds=$2 ;;
    *)
      echo "gpu.sh: unknown option $1; it takes --out FOLDER, --part \"NAMES\" and --seconds N" >&2
      exit 2
      ;;
  esac
  shift 2
done
mkdir -p "$out"
unset TRITON_INTERPRET
export PYTHONUNBUFFERED=1
failed=""

wanted() { case " $parts " in *" $1 "*) true ;; *) false ;; esac; }

# Seconds that are left of nine minutes, at most $1.
left() {
  local rest=$((530 - SECONDS))
  echo $((rest < $1 ? (rest > 1 ? rest : 1) : $1))
}

# step NAME LIMIT COMMAND...: the command's output goes to a log; its end is shown where it fails.
step() {
  local name=$1 limit start=$SECONDS
  limit=$(left "$2")
  shift 2
  if timeout "$limit" "$@" >"$out/$name.log" 2>&1; then
    echo "== $name: done in $((SECONDS - start)) s"
  else
    echo "== $name: FAILED ($?) after $((SECONDS - start)) s"
    tail -n 40 "$out/$name.log"
    failed="$failed $name"
  fi
}

loaded() {
  python3 -c "import sys; from rftcore import build; sys.exit(any(map(build.why_not_loaded, build.MODULES)))" 2>/dev/null
}

if wanted build && ! loaded; then
  step build 180 python3 -m pip install --quiet --no-build-isolation --no-deps --editable .
fi
python3 -c "from rftcore.build import format_info; print(format_info())" | tee "$out/info.txt"

if wanted tests; then
  # Compiling takes most of it: a process a core.
  step tests 240 python3 -m pytest -q -n auto -p no:cacheprovider \
    python_tests/ops/test_every_backend.py python_tests/ops/test_group_norm_silu.py \
    python_tests/ops/test_sampler_step.py python_tests/kernels python_tests/blocks/test_on_gpu.py \
    --ignore python_tests/kernels/test_ahead_of_time.py
  tail -n 1 "$out/tests.log"
fi
if wanted sanitizer; then
  if command -v compute-sanitizer >/dev/null; then
    step sanitizer 90 compute-sanitizer --error-exitcode 9 python3 -m pytest -q -p no:cacheprovider \
      python_tests/ops/test_every_backend.py -k "cuda and fp32"
  else
    echo "== sanitizer: compute-sanitizer is not here"
  fi
fi
if wanted ops; then
  # A minute for the measurement that is under way, and one for the models.
  step ops $((seconds + 60)) python3 -m benchmarks.gpu --part ops --seconds "$(left "$seconds")" --out "$out/gpu_ops.json"
fi
if wanted models; then
  step models 150 python3 -m benchmarks.gpu --part models --seconds "$(left 90)" --out "$out/gpu_models.json"
fi
if wanted tune; then
  step tune 530 python3 -m benchmarks.tune --seconds "$(left 480)" --out "$out"
fi
if wanted chain; then
  # Half a minute for the case that is under way.
  step chain 530 python3 -m benchmarks.gpu_chain --plans "$out/plans.json" --seconds "$(left 480)"
  if [ benchmarks/results/gpu_chain.json -nt "$out/info.txt" ]; then cp benchmarks/results/gpu_chain.json "$out/"; fi
fi
for part in ops models tune chain; do
  if wanted $part; then grep "^|\|^copy" "$out/$part.log"; fi
done
[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
