#!/bin/sh
# The C++ tests of the native core, built without Python under build/ (the Makefile calls this):
#   run.sh test       in every instruction set of this machine
#   run.sh sanitize   with the address and undefined-behaviour sanitizers, then, for what threads
#                     share, the thread sanitizer
#   run.sh arm        cross-compiled, on emulated 64-bit Arm processors of three ages
#   run.sh avx512     the AVX-512 files on a machine without AVX-512
# More words choose tests by name.
set -eu
cd -- "$(dirname -- "$0")/../.."
SANITIZE="-O1 -g -fno-omit-frame-pointer -fno-sanitize-recover=all"

# need COMMAND PACKAGE: ends with what to install when the command is not there.
need() {
  command -v "$1" >/dev/null || { echo "$0: no $1 here: apt-get install $2" >&2; exit 1; }
}

# build NAME CMAKE-ARGUMENTS...: makes build/native-NAME/core_test; its output only when it fails.
build() {
  name=$1; shift
  mkdir -p "build/native-$name"
  log=build/native-$name/log.txt
  echo "building the $name tests ..."
  { cmake -S . -B "build/native-$name" "$@" &&
    cmake --build "build/native-$name" --target core_test -j "$(getconf _NPROCESSORS_ONLN)"
  } >"$log" 2>&1 || { cat "$log" >&2; exit 1; }
}

# A function that two files share may be linked from either: one compiled for a newer processor
# would then run on an older one. So files of an instruction set export only functions of their own.
keep_apart() {
  for object in build/native-test/CMakeFiles/endside_core.dir/endside/native/src/*_"$1".cc.o; do
    [ -f "$object" ] || continue
    shared=$(nm -C "$object" | grep -E ' [VWu] ' || true)
    [ -z "$shared" ] || { echo "$object shares code with other files:"; echo "$shared"; exit 1; }
  done
}

# old_arm PROCESSOR SET WORDS...: the tests pass on an emulated processor, without SET.
old_arm() {
  processor=$1 set=$2; shift 2
  lines=$(qemu-aarch64-static -cpu "$processor" build/native-arm/core_test "$@") ||
    { echo "$lines"; exit 1; }
  echo "$lines"
  case $lines in *" $set:"*) echo "$processor was given $set" >&2; exit 1;; esac
}

need cmake cmake
what=$1; shift
case $what in
  test)
    build test
    for isa in avx2 avx512 amx neon neon_i8mm; do keep_apart "$isa"; done
    build/native-test/core_test "$@";;
  sanitize)
    build address -DCMAKE_CXX_FLAGS_RELEASE="$SANITIZE -fsanitize=address,undefined"
    build/native-address/core_test "$@"
    build thread -DCMAKE_CXX_FLAGS_RELEASE="$SANITIZE -fsanitize=thread"
    build/native-thread/core_test "${@:-pool}" attention_sharing;;
  arm)
    need aarch64-linux-gnu-g++ g++-aarch64-linux-gnu
    need qemu-aarch64-static qemu-user-static
    build arm -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
      -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_EXE_LINKER_FLAGS=-static
    echo "int8 dot and matrix products:"
    qemu-aarch64-static -cpu max build/native-arm/core_test "$@"
    echo "dot products only:"
    old_arm neoverse-n1 neon_i8mm isa linear_odd
    echo "neither (portable code only):"
    old_arm cortex-a72 neon isa rmsnorm linear_odd;;
  avx512)
    echo '#include <simde/x86/avx512.h>' | c++ -E -x c++ - >/dev/null 2>&1 ||
      { echo "$0: no SIMDe headers here: apt-get install libsimde-dev" >&2; exit 1; }
    build avx512 -DENDSIDE_EMULATE_AVX512=ON
    build/native-avx512/core_test "${@:-avx512}" widths_agree;;
  *) echo "$0: test, sanitize, arm or avx512?" >&2; exit 2;;
esac
