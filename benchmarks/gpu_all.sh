#!/usr/bin/env bash
# The whole measurement of the kernels on one GPU, in one call of under nine minutes: bash benchmarks/gpu_all.sh [FOLDER]
#
# Tests of the kernels, compute-sanitizer on small sizes, errors and times against peers, plots, driver and clocks; all
# in FOLDER (runs/gpu); where OUT names a folder, gpu_all.tar.gz of it, summary and tables come there too. Each part
# has its own limit; one that fails or runs out is reported and the others go on. Needs python3 with torch, triton, numpy,
# pytest and matplotlib; peers that are not installed are named in the tables. COMMIT says what is measured where there is
# no git. The same call later goes on with the times. --cpu-smoke: the same parts, tiny, without a GPU. Tile sizes for
# the GPU come from `vlscale bench tune`; with VLSCALE_TILES the same call measures them.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

smoke=
folder=
for given in "$@"; do
  case $given in
    --cpu-smoke) smoke=1 ;;
    -h | --help) sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    -*) echo "error: $given: expected FOLDER or --cpu-smoke" >&2; exit 2 ;;
    *) folder=$given ;;
  esac
done
folder=${folder:-runs/gpu}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" MPLBACKEND=Agg
started=$SECONDS
report=()
failed=0

# part NAME SECONDS COMMAND...: output in FOLDER/NAME.log, its last lines also here.
part() {
  local name=$1 limit=$2 begun=$SECONDS code=0 state
  shift 2
  echo "== $name (at most $limit s)"
  timeout --kill-after=10 "$limit" "$@" >"$folder/$name.log" 2>&1 || code=$?
  case $code in
    0) state=ok ;;
    124 | 137) state="stopped after $limit s" failed=1 ;;
    *) state="failed ($code)" failed=1 ;;
  esac
  tail -n 4 "$folder/$name.log" | cut -c1-160
  report+=("$(printf '%-18s %-22s %4d s' "$name" "$state" $((SECONDS - begun)))")
}

machine() {
  date -u +%FT%TZ
  git describe --always --dirty 2>/dev/null || echo "commit ${COMMIT:-unknown}"
  uname -srm
  if command -v nvidia-smi >/dev/null; then
    nvidia-smi
    nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu --format=csv
  else
    echo "no nvidia-smi"
  fi
  nvcc --version 2>/dev/null | tail -n 2 || echo "no nvcc"
  "$python" -c '
import platform, torch, triton
cuda = torch.cuda.is_available()
print("Python", platform.python_version(), "torch", torch.__version__, "triton", triton.__version__)
print(torch.cuda.get_device_name() if cuda else "no CUDA device")'
}
export -f machine
export python

clocks() {  # while the rest runs
  command -v nvidia-smi >/dev/null || return 0
  nvidia-smi --query-gpu=timestamp,clocks.sm,clocks.mem,power.draw,temperature.gpu,utilization.gpu --format=csv -l 2 \
    >"$folder/clocks.csv" 2>/dev/null &
  trap "kill $!" EXIT
}

if [ -n "$smoke" ]; then
  export TRITON_INTERPRET=1
  tests=(tests/kernels/test_preprocess.py -k "narrow or bad_input")
  size=(--device cpu --pairs 64 130 --widths 16 --scales 100 --rounds 3 --without compiled)
  accuracy=("${size[@]}")
  main=(--minutes 1 --families contrastive)
  narrow=("${main[@]}")
  rest=(--minutes 1 --families ranks)
  pictures=(--device cpu --batch 2 --rounds 3)
  small=(--accuracy --device cpu --pairs 65 --widths 16 --scales 100 --without compiled)
else
  # What runs on the device; the others prove the CPU's forms. Compiling keeps every core busy.
  tests=(tests/kernels/test_{triton,triton_fused,triton_kept,triton_relation,triton_host,triton_regimes}.py
    tests/kernels/test_{retrieval,preprocess}.py -v --durations=15)
  "$python" -c "import xdist" 2>/dev/null && tests+=(-n 8 --dist load)
  size=(--device cuda)
  families=(contrastive sigmoid relation_kl relation_mae relation_mse)  # the others: kernels_bench.py by itself
  accuracy=(--device cuda --widths 512 --scales 14 100 --without compiled --families "${families[@]}")
  main=(--minutes 1.9 --families contrastive relation_kl --pairs 32768 131072 4096 --widths 512 1024 --scales 100)
  narrow=(--minutes 0.25 --families contrastive --pairs 4096 32768 --widths 128 256 --scales 100 --without compiled)
  rest=(--minutes 0.7 --families sigmoid relation_mae relation_mse neighbours ranks --pairs 4096 32768 --widths 512
    --scales 100 --without compiled)
  pictures=(--device cuda)
  small=(--accuracy --device cuda --pairs 129 --widths 64 --scales 100 --without compiled Inf-CL CCE Liger open_clip two
    --families "${families[@]}")
fi

# Only the fixtures of tests/kernels: the rest of the suite needs packages that a kernel does not.
pytest=(-p no:cacheprovider --confcutdir=tests/kernels --maxfail=20 --continue-on-collection-errors)

part machine 15 bash -c machine
clocks
part tests 120 "$python" -m pytest "${pytest[@]}" "${tests[@]}"
part errors 55 "$python" benchmarks/kernels_bench.py --accuracy --out "$folder" "${accuracy[@]}"
part times 135 "$python" benchmarks/kernels_bench.py --out "$folder" "${size[@]}" "${main[@]}"
part times_narrow 25 "$python" benchmarks/kernels_bench.py --out "$folder" "${size[@]}" "${narrow[@]}"
part times_rest 55 "$python" benchmarks/kernels_bench.py --out "$folder" "${size[@]}" "${rest[@]}"
part pictures 25 "$python" benchmarks/kernels_bench.py --pictures --out "$folder" "${pictures[@]}"
comparing=
if [ -z "$smoke" ]; then  # on the CPU, beside the checks below; whatever becomes of it, the measurement is there
  timeout 60 "$python" benchmarks/kernels_model.py --against "$folder/kernels.csv" >"$folder/predicted.log" 2>&1 &
  comparing=$!
fi
sanitizer=$(command -v compute-sanitizer || true)
if [ -n "$smoke" ]; then
  part memcheck 60 "$python" benchmarks/kernels_bench.py --out "$folder/memcheck" "${small[@]}"
elif [ -n "$sanitizer" ]; then
  check=("$sanitizer" --error-exitcode 9 --print-limit 20)
  part memcheck 40 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${check[@]}" --tool memcheck \
    "$python" benchmarks/kernels_bench.py --out "$folder/memcheck" "${small[@]}"
  part memcheck_pictures 30 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${check[@]}" --tool memcheck \
    "$python" -m pytest -q "${pytest[@]}" tests/kernels/test_preprocess.py -k "on_a_gpu and 37"
  part racecheck 35 "${check[@]}" --tool racecheck \
    "$python" benchmarks/kernels_bench.py --out "$folder/racecheck" "${small[@]}" --families contrastive
else
  report+=("memcheck           no compute-sanitizer here")
fi

if [ -n "$comparing" ] && ! wait "$comparing"; then
  report+=("predicted          no comparison: $(tail -n 1 "$folder/predicted.log" | cut -c1-120)")
fi

{
  echo "gpu_all: $((SECONDS - started)) s, files in $folder"
  printf '%s\n' "${report[@]}"
  grep -h -E '^[0-9]+ (passed|failed)|passed|failed' "$folder/tests.log" | tail -n 1
} | tee "$folder/summary.txt"
if [ -n "${OUT:-}" ]; then
  tar -czf "$OUT/gpu_all.tar.gz" -C "$folder" .
  for name in summary.txt kernels.md predicted.md accuracy.md tests.log; do
    [ -e "$folder/$name" ] && cp "$folder/$name" "$OUT/"
  done
fi
exit $failed
