#!/bin/bash
# Builds and runs the tests with other compilers, languages, sanitizers and machines: one compiler
# line each, a row to a core:
#   tests/run_matrix.sh            all rows
#   tests/run_matrix.sh ROW...     these
#   tests/run_matrix.sh list       their names and compiler lines
# A row whose compiler or emulator is missing fails. Closes with 'N passed, N failed'.
cd "$(dirname "$0")" || exit 1
warnings="-Wall -Wextra -Wpedantic -Wconversion -Wsign-conversion -Wshadow -Wcast-align -Wundef"
warnings+=" -Werror"
sanitize="-std=c99 -g -O1 -fno-omit-frame-pointer -fno-sanitize-recover=all"
all="config score allocate pack open tail attend report sequence compress simd threads paper"
most="config score allocate pack tail attend report sequence compress simd paper"
core="pack attend simd"

# row NAME RUNNER TESTS COMPILER-LINE...: compiles the library once, then each test against it.
rows=() passed=0 failed=0 only=
[ $# = 1 ] && only=$1
row() {
  local name=$1 runner=$2 tests=$3 test objects start=$SECONDS
  shift 3
  rows+=("$name")
  [ "$only" = list ] && echo "$name: $*"
  [ "$only" = "$name" ] || return 0
  mkdir -p "$out/$name"
  if ! "$@" $warnings -c rdkv_impl.c -o "$out/$name/rdkv.o" 2>"$out/$name/log"; then
    head -20 "$out/$name/log" | sed 's/^/    /'
    echo "FAIL $name: rdkv.h does not compile"
    failed=$((failed + 1))
    return 0
  fi
  for test in $tests; do
    objects="-x none $out/$name/rdkv.o"
    [ "$test" = paper ] && objects= # it includes the library itself
    # The tests look for NaN, so -Ofast is for the library; its start-up code, which flushes
    # subnormals, is for both.
    [[ "$*" == *-Ofast* && -n "$objects" ]] && objects+=" -O2 $(gcc -print-file-name=crtfastmath.o)"
    if { "$@" $warnings test_"$test".c $objects -o "$out/$name/$test" -pthread -lm &&
      { [ "$runner" = none ] || timeout 900 $runner "$out/$name/$test"; }; } >"$out/$name/log" 2>&1; then
      passed=$((passed + 1))
    else
      tail -25 "$out/$name/log" | cut -c1-300 | sed 's/^/    /'
      echo "FAIL $name: test_$test"
      failed=$((failed + 1))
    fi
  done
  echo "$name: $((SECONDS - start)) s"
}

[ $# -le 1 ] && out=$(mktemp -d) && trap 'rm -rf "$out"' EXIT

row gcc-asan    env  "$all"       gcc $sanitize -fsanitize=address,undefined
row aarch64     "qemu-aarch64 -L /usr/aarch64-linux-gnu" "config score pack tail attend simd paper" \
                                  aarch64-linux-gnu-gcc -std=c99 -O2
row m32         env  "$most"      gcc-12 -m32 -std=c99 -O2
row clang-asan  env  "open $core" clang $sanitize -fsanitize=address,undefined
row gcc-ofast   env  "config score allocate pack tail attend report sequence compress simd" gcc -std=c99 -Ofast
row clang-ofast env  "score $core" clang -std=c99 -Ofast
row clang       env  "$all"       clang -std=c99 -O2
row gcc-tsan    env  threads      gcc $sanitize -fsanitize=thread
row clang-tsan  env  threads      clang $sanitize -fsanitize=thread
row no-simd     env  "$core"      gcc -std=c99 -O2 -DRDKV_NO_SIMD
row native      env  "$core"      gcc -std=c99 -O3 -march=native
row cxx11-gcc   env  "$core"      g++ -x c++ -std=c++11 -O2
row cxx20-gcc   env  "$core"      g++ -x c++ -std=c++20 -O2
row cxx11-clang env  "$core"      clang++ -x c++ -std=c++11 -O2
row cxx20-clang env  "$core"      clang++ -x c++ -std=c++20 -O2
row mingw       none config       x86_64-w64-mingw32-gcc -std=c99 -O2

[ "$only" = list ] && exit
if [ $# != 1 ]; then # each row in a process of its own
  while read -r line; do
    case $line in
      *" passed, "*" failed") set -- $line; passed=$((passed + $1)) failed=$((failed + $3)) ;;
      *) echo "$line" ;;
    esac
  done < <(printf '%s\n' "${@:-${rows[@]}}" | xargs -n 1 -P "$(nproc)" ./run_matrix.sh)
fi
echo "$passed passed, $failed failed"
[ "$failed" = 0 ] && [ "$passed" != 0 ]
