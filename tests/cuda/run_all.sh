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
if has sanitize; then
  : > "$out/sanitizer.txt"
  for tool in memcheck initcheck synccheck racecheck; do # the last takes longest
    running= reports=
    for test in test_cuda test_compress test_sequence; do
      options="--error-exitcode 9 --tool $tool"
      names=all
      case $tool.$test in # room for all barriers; more takes more time
        synccheck.test_cuda | synccheck.test_compress) options="$options --num-cuda-barriers 65536" ;;
        synccheck.test_sequence) options="$options --num-cuda-barriers 4096" ;;
        # apart: where the solver's blocks wait for one another it takes very long
        racecheck.test_compress)
          names="pack measure score items allocate max_error histogram stream refused graph" ;;
        racecheck.test_sequence)
          names="block_by_block attention chunks replays rollback fork save no_room merging" ;;
      esac
      [ $test = test_sequence ] && plain=plain || plain= # of graphs the tools say less
      for name in $names; do
        report=$test.$tool.$name
        [ $name = all ] && name=
        compute-sanitizer $options "$bin/$test" small $plain $name > "$out/$report" 2>&1 &
        running="$running $!" reports="$reports $report"
      done
    done
    ended
    for report in $reports; do
      { echo "== $report"; head -200 "$out/$report"; } >> "$out/sanitizer.txt"
      echo "$report: $(tail -1 "$out/$report")"
    done
  done
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
