#!/bin/sh
# Builds, tests, sanitizes and measures the CUDA header on this machine's GPU. Full output goes to
# FOLDER, a summary is printed. Exit code 0: everything passed.
# tests/cuda/run_all.sh FOLDER [build] [test] [sanitize] [bench] [peers] [profile]
# No words: all. Programs go to RDKV_BIN, or a temporary folder: where time on the GPU is short, build
# elsewhere (RDKV_ARCH=90) and run the other parts with the same RDKV_BIN there.
cd "$(dirname "$0")/../.." || exit 2
out=${1:?usage: run_all.sh FOLDER [parts]}
mkdir -p "$out"
shift
parts=" ${*:-build test sanitize bench peers profile} "
bin=${RDKV_BIN:-$(mktemp -d)}
failed=0
ended() { for process in $running; do wait $process || failed=1; done; }
has() { case $parts in *" $1 "*) return 0 ;; esac; return 1; }

if has build; then
  arch=${RDKV_ARCH:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)}
  [ "$arch" = 90 ] && arch=90a # has warp groups
  flags="-O3 -std=c++17 -lineinfo -gencode arch=compute_$arch,code=sm_$arch"
  mkdir -p "$bin"
  for source in tests/cuda/test_cuda.cu tests/cuda/test_compress.cu tests/cuda/test_sequence.cu \
    bench/bench_cuda.cu bench/bench_compress.cu bench/bench_sequence.cu examples/decode.cu \
    examples/prefill_decode.cu; do
    name=$(basename $source .cu)
    library=
    [ $name = prefill_decode ] && library=-lcublas
    nvcc $flags $source -o "$bin/$name" $library > "$bin/$name.log" 2>&1 || echo "$name: not built" &
  done
  wait
  cat "$bin"/*.log
fi
{
  date -u
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
  nvcc --version | tail -2
} > "$out/machine.txt" 2>&1

if has test; then
  running=
  for test in test_cuda test_compress test_sequence; do
    "$bin/$test" > "$out/$test.txt" 2>&1 &
    running="$running $!"
  done
  ended
  for test in test_cuda test_compress test_sequence; do
    echo "$test: $(tail -1 "$out/$test.txt")"
    grep FAIL "$out/$test.txt"
  done
  "$bin/decode" > "$out/decode.txt" 2>&1 || failed=1
  cat "$out/decode.txt"
  "$bin/prefill_decode" --check > "$out/prefill_decode_check.txt" 2>&1 || failed=1
  cat "$out/prefill_decode_check.txt"
fi
if has sanitize; then # RDKV_LIMIT: seconds for each
  check() {
    options="--error-exitcode 9 --tool $1"
    name=$3
    [ $name = all ] && name=
    [ $2 = test_sequence ] && name="plain $name" # of graphs the tools say less
    case $1.$2 in # room for all barriers; more takes more time
      synccheck.test_cuda | synccheck.test_compress) options="$options --num-cuda-barriers 65536" ;;
      synccheck.test_sequence) options="$options --num-cuda-barriers 4096" ;;
    esac
    timeout "${RDKV_LIMIT:-3600}" compute-sanitizer $options "$bin/$2" small $name > "$out/$2.$1.$3" 2>&1
    code=$?
    [ $code = 124 ] && echo "did not end in ${RDKV_LIMIT:-3600} s" >> "$out/$2.$1.$3"
    echo "$2.$1.$3: $(tail -1 "$out/$2.$1.$3")"
    return $code
  }
  together() { # TOOL TEST NAME..., side by side
    tool=$1 test=$2
    shift 2
    for name; do
      check $tool $test $name &
      running="$running $!"
    done
  }
  running=
  for tool in memcheck initcheck synccheck; do
    for test in test_compress test_sequence test_cuda; do together $tool $test all; done
  done
  together racecheck test_cuda all
  together racecheck test_compress pack measure score items refused allocate_paper
  ended
  running= # these take racecheck long
  together racecheck test_compress allocate_long max_error histogram stream graph
  together racecheck test_sequence block_by_block chunks rollback fork save no_room merging
  ended
  running= # and these longest: short prompts are solved hundreds of times
  together racecheck test_compress allocate_short allocate_edges
  ended
  for report in "$out"/test_*.*check.*; do
    echo "== $(basename "$report")"
    head -200 "$report"
  done > "$out/sanitizer.txt"
fi
if has bench; then
  "$bin/bench_cuda" --csv > "$out/bench.csv" || failed=1
  cat "$out/bench.csv"
  "$bin/bench_compress" > "$out/bench_compress.txt" || failed=1
  cat "$out/bench_compress.txt"
  "$bin/prefill_decode" > "$out/prefill_decode.txt" || failed=1
  cat "$out/prefill_decode.txt"
  "$bin/bench_sequence" > "$out/bench_sequence.txt" || failed=1
  "$bin/bench_sequence" --together >> "$out/bench_sequence.txt" || failed=1
  "$bin/bench_sequence" --dense >> "$out/bench_sequence.txt" || failed=1
  cat "$out/bench_sequence.txt"
fi
if has peers; then
  python3 bench/peers.py "$out/bench.csv" > "$out/peers.txt" 2>&1
  cat "$out/peers.txt"
fi
if has profile; then # what bounds the kernel: counters of one launch in the middle of a graph
  for row in "budget 1024, batch 1," "budget 1024, batch 64" "2-bit mix"; do
    echo "== $row"
    ncu --clock-control none --set full --import-source no -k "regex:attend|latency" -s 8 -c 1 \
      "$bin/bench_cuda" --replays 1 "$row" 2>&1 |
      grep -E "Duration|DRAM Through|Ipc Active|Issue Slots Busy|Registers Per|Spilling" |
      grep -vE "OPT|INF"
  done > "$out/ncu.txt"
fi
[ -n "$RDKV_BIN" ] || rm -r "$bin"
[ $failed = 0 ] && echo "all passed" || echo "FAILED"
exit $failed
