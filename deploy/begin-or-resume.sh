#!/bin/sh
# Begins the run in a folder, or goes on with it: what starts a container again does not know which.
#
#   begin-or-resume.sh learner|train RUN_DIR "ARGUMENTS OF A NEW RUN" [ARGUMENTS OF BOTH]...
set -eu
[ "$#" -ge 3 ] || { echo "expected a command, a run directory and the arguments of a new run" >&2; exit 2; }
command=$1 run_dir=$2 new_run=$3
shift 3
# A folder with this file is a run; it is the first that a run writes.
if [ -e "$run_dir/config.toml" ]; then
    exec autodidact "$command" --resume --run-dir "$run_dir" "$@"
fi
# Several words: a preset and what is changed of it.
# shellcheck disable=SC2086
exec autodidact "$command" $new_run --run-dir "$run_dir" "$@"
