#!/bin/sh
# The tour: real text, a tokenizer, a small model, answers; all on this machine, in minutes.
#   runs/tour.sh [--corpus DIR]         (or `make demo`, which installs what is missing first)
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
if [ -x "$here/.venv/bin/endside" ]; then
  exec "$here/.venv/bin/endside" demo "$@"
fi
exec endside demo "$@"
