#!/bin/sh
# Starts the run in a directory, or resumes it: whatever restarts a container does not know which of the two is needed.
#
#   begin-or-resume.sh learner|train RUN_DIR "ARGUMENTS OF A NEW RUN" [ARGUMENTS OF BOTH]...
set -eu
[ "$#" -ge 3 ] || { echo "expected a command, a run directory and the arguments of a new run" >&2; exit 2; }
command=$1 run_dir=$2 new_run=$3
shift 3
# A directory with this file holds a run: it is the first file that a run writes.
if [ -e "$run_dir/config.toml" ]; then
    exec autodidact "$command" --resume --run-dir "$run_dir" "$@"
fi
# Several words: a preset and the keys that are changed.
# shellcheck disable=SC2086
exec autodidact "$command" $new_run --run-dir "$run_dir" "$@"
