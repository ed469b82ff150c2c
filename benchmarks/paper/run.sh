#!/bin/sh
# One row of the paper's tables: train, evaluate, one JSON. `run.sh --list` shows the rows.
exec "${PYTHON:-python}" "$(dirname "$0")/run.py" "$@"
