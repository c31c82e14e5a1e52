# Sourced by scripts that run in steps: step NAME COMMAND... runs a command and notes its seconds in the
# file that EDGEGLM_STEPS names, if it names one, also where the command fails.
# shellcheck shell=bash
step() {
  local name="$1" started=$SECONDS status=0
  shift
  "$@" || status=$?
  local said=""
  if [ "$status" -ne 0 ]; then said=", failed"; fi
  printf '%6d s  %s%s\n' "$((SECONDS - started))" "$name" "$said" >> "${EDGEGLM_STEPS:-/dev/null}"
  return "$status"
}
