#!/bin/sh
# Make this bundle ready on a board with trtexec alone: no Python, POSIX sh, awk, sed, od, sha256sum.
#
#     sh finalize.sh [--any-board] [--trtexec PATH]
#
# trtexec is taken from where JetPack puts it, else from PATH. No root is needed.
#
# It checks the files it uses against the digests below, finds out which board and TensorRT this is,
# takes the lane that this TensorRT parses, builds each candidate once, runs the golden inputs through
# it and compares with what they gave where the bundle was made, times it, and writes
# <bundle>.finalized/receipt-trtexec.json last. Engines are used again while nothing that decides
# them changes. Exits: 0 done, 1 trtexec failed, 2 bad input or board, 3 no candidate answers as at home.
#
# What a recipe or a target asks of the builder ([engine]) is written in below. Where the board has
# tegrastats, the receipt says what timing the candidates took.
#
# It does not check signatures: verify the bundle with edgeglm on the machine that copies it here.
set -eu
LC_ALL=C
export LC_ALL

root="${EDGEGLM_ROOT:-}" # a copy of a board's files, for tests
here="${EDGEGLM_BUNDLE:-$(cd "$(dirname "$0")" && pwd)}" # edgeglm runs its own copy on a bundle
beside="${EDGEGLM_SHELL:-$here}" # with what belongs to this script, in shell/
out="${EDGEGLM_FINALIZED:-$here.finalized}" # elsewhere where the bundle is an archive
if [ -z "${EDGEGLM_FINALIZED:-}" ] && [ -L "$here" ] && [ ! -d "$out" ]; then
  out="$(cd "$here" && pwd -P).finalized" # a link shares that of the bundle that it names
fi
trtexec="$root/usr/src/tensorrt/bin/trtexec"
[ -x "$trtexec" ] || trtexec="$(command -v trtexec || echo "$trtexec")"
tegrastats="$root/usr/bin/tegrastats"
[ -x "$tegrastats" ] || tegrastats="$(command -v tegrastats || true)"
any_board=no
least_cosine=0.99
least_agreement=0.9

# --- what the maker wrote in -----------------------------------------------------------------------
name='@NAME@'
content='@CONTENT@'
target='@TARGET@'
sms='@SMS@' # compute capabilities of the target's boards
digests() {
  cat <<'END'
@DIGESTS@
END
}
# sm least-kilobytes lane "ok" usual-batch largest-batch flags..., or "no" and why; the largest board first
options() {
  cat <<'END'
@OPTIONS@
END
}
# variant tower lane precision model bytes outputs fp32-nodes neighbours min opt max shape-of-one shape-of-goldens inputs
# where N is the batch that this board's engines are made for
candidates() {
  cat <<'END'
@CANDIDATES@
END
}
# ---------------------------------------------------------------------------------------------------

say() { printf '%s\n' "$*"; }
told=no
fail() {
  code="$1" told=yes
  shift
  printf 'error: %s\n' "$*" >&2
  exit "$code"
}
no_space() { fail 2 "no space is left for $out; free some and begin again"; }
full() { # whether a file of 64 kB can no longer be written there
  if dd if=/dev/zero of="$work/probe" bs=1024 count=64 >/dev/null 2>&1; then
    rm -f "$work/probe"
    return 1
  fi
  rm -f "$work/probe"
}
ended() { # clean up, and say why a write failed, which the shell says in its own words only
  code=$?
  [ -z "$watcher" ] || kill "$watcher" 2>/dev/null || true
  if [ "$code" -ne 0 ] && [ "$code" -ne 130 ] && [ "$told" = no ] && full; then
    printf 'error: no space is left for %s; free some and begin again\n' "$out" >&2
    code=2
  fi
  rm -rf "$work"
  exit "$code"
}

while [ $# -gt 0 ]; do
  case "$1" in
    --any-board) any_board=yes ;;
    -h | --help)
      sed -n '2,/^set -eu/s/^#[ ]\{0,1\}//p' "$0"
      exit 0
      ;;
    --trtexec)
      [ $# -gt 1 ] || fail 2 "--trtexec needs a path; give one"
      trtexec="$2"
      shift
      ;;
    *) fail 2 "unknown argument $1; use --any-board, --trtexec PATH or --help" ;;
  esac
  shift
done

{ digests | grep -v '  shell/' | (cd "$here" && sha256sum -c >/dev/null 2>&1) &&
  digests | grep '  shell/' | (cd "$beside" && sha256sum -c >/dev/null 2>&1); } ||
  fail 2 "a file of the bundle was altered or cut off; copy the bundle here again"

chips="$(tr '\0' '\n' 2>/dev/null <"$root/proc/device-tree/compatible" || true)"
case "$chips" in
  *nvidia,tegra194*) sm=72 ;;
  *nvidia,tegra234*) sm=87 ;;
  *nvidia,tegra264*) sm=110 ;;
  *) sm=none ;;
esac
model="$(cat "$root/proc/device-tree/model" 2>/dev/null | tr -d '\0"\134')"
model="${model:-unknown}"
l4t="$(sed -n 's/^# R\([0-9]*\) (release), REVISION: \([0-9.]*\).*/\1.\2/p' \
  "$root/etc/nv_tegra_release" 2>/dev/null || true)"
case " $sms " in
  *" $sm "*) ;;
  *) [ "$any_board" = yes ] ||
    fail 2 "this is $model (SM $sm); the bundle is for $target (SM $sms); pass --any-board to go on" ;;
esac
[ -x "$trtexec" ] || fail 2 "no trtexec at $trtexec; install the package libnvinfer-bin or pass --trtexec PATH"
version="$(awk '/^Package: /{p=$2; here=0} /^Status: /{here=($NF == "installed")}
  /^Version: /{if (here && p ~ /^libnvinfer[0-9]+$/) {split($2, v, "[.-]");
  print v[1] "." v[2] "." v[3]; exit}}' "$root/var/lib/dpkg/status" 2>/dev/null || true)"
[ -n "$version" ] || fail 2 "the package list names no libnvinfer; install TensorRT"
if [ "${version%%.*}" -lt 10 ]; then lane=A; else lane=B; fi

mine="$(candidates | awk -v lane="$lane" '$3 == lane')"
[ -n "$mine" ] || fail 2 "TensorRT $version takes lane $lane, of which the bundle has nothing; build it with one"
need="$(printf '%s\n' "$mine" | awk '{if ($6 > m) m = $6} END {printf "%d", (4 * m + 314572800) / 1024}')"
free="$(awk '/^MemAvailable:/{print $2}' "$root/proc/meminfo")"
[ "${free:-0}" -ge "$need" ] ||
  fail 2 "building needs $((need / 1024)) MB and $((${free:-0} / 1024)) MB are free; end other programs or add swap"

memory="$(awk '/^MemTotal:/{print $2}' "$root/proc/meminfo")"
granted="$(options | awk -v sm="$sm" -v kb="${memory:-0}" -v lane="$lane" '$1 == sm && $3 == lane {
  line = $0; sub(/^[^ ]+ [^ ]+ [^ ]+ /, "", line); if (kb >= $2) exit} END {print line}')"
case "$granted" in
  no\ *) fail 2 "${granted#no }" ;;
esac
# shellcheck disable=SC2086 # it is words
set -- ${granted:-ok 8 32}
usual_batch="$2" largest_batch="$3"
shift 3
asked="$*"
loading='' # what an engine built so needs when it is loaded: leave to run its code, a budget for its weights
case " $asked " in *" --versionCompatible "*) loading=--versionCompatible ;; esac
case " $asked " in *" --allowWeightStreaming "*) loading="$loading --weightStreamingBudget=-1" ;; esac

mkdir -p "$out/engines" 2>/dev/null ||
  fail 2 "cannot write $out: no space is left or no permission; free some space or make it writable"
# The lock is the kernel's: it is given up with the process, however that ends, and is edgeglm's own, which
# holds it already where it runs this script.
lock="$out/.lock"
if [ "${EDGEGLM_LOCKED:-no}" = no ]; then
  command -v flock >/dev/null || fail 2 "no flock on this board; install util-linux"
  [ ! -L "$lock" ] || fail 2 "$lock is a link; remove it"
  exec 9>>"$lock" || fail 2 "cannot write $lock; make $out writable"
  flock -n 9 || {
    owner="$(sed -n 's/.*"pid":\([0-9]*\).*/ (process \1)/p' "$lock")"
    fail 2 "another finalize is at work$owner; wait until it has ended"
  }
  printf '{"pid":%s,"started":"%s"}' $$ "$(date -u +%Y-%m-%dT%H:%M:%S+00:00)" >"$lock" || no_space
fi
for left in "$out"/.work.*; do rm -rf "$left"; done # of one that was killed
work="$out/.work.$$"
watcher=''
trap ended EXIT
trap 'exit 130' INT TERM
mkdir "$work" 2>/dev/null || no_space
: >"$work/power"

timed() { # the latency of one call, and what the board took meanwhile
  if [ -n "$tegrastats" ]; then
    "$tegrastats" --interval 100 >>"$work/power" 2>/dev/null 9>&- &
    watcher=$!
  fi
  ended=0
  # shellcheck disable=SC2086 # flags are words
  "$trtexec" "--loadEngine=$place/engine.plan" "--shapes=$single" --warmUp=200 --duration=1 $loading \
    >"$work/time.log" 2>&1 || ended=1
  if [ -n "$watcher" ]; then
    kill "$watcher" 2>/dev/null || true
    wait "$watcher" 2>/dev/null || true
    watcher=''
  fi
  return $ended
}

text_of() { # a file's content as it may stand in JSON; nothing where it cannot be read
  tr -d '\000-\037"\134' 2>/dev/null <"$1" || true
}

bytes_of() { awk -v kb="$1" 'BEGIN {printf "%.0f", kb * 1024}'; }

measured() { # what, file, unit: "what": the number in the file by the unit; nothing where it tells none
  number="$(text_of "$2")"
  case "$number" in '' | *[!0-9-]*) return 0 ;; esac
  awk -v n="$number" -v u="$3" -v w="$1" 'BEGIN {printf ", \"%s\": %.1f", w, n / u}'
}

conditions() { # heat, clocks and what holds back now, as far as the board tells: as edgeglm's own receipt
  heat='' clocks='' throttled=''
  for zone in "$root"/sys/class/thermal/thermal_zone*; do
    kind="$(text_of "$zone/type")"
    heat="$heat$(measured "${kind:-${zone##*/}}" "$zone/temp" 1000)"
  done
  clocks="$(measured cpu0 "$root/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq" 1000)"
  for device in "$root"/sys/class/devfreq/*; do
    case "${device##*/}" in
      *gpu* | *.gv11b | *.ga10b) clocks="$clocks$(measured gpu "$device/cur_freq" 1000000)" && break ;;
    esac
  done
  for device in "$root"/sys/class/thermal/cooling_device*; do
    kind="$(text_of "$device/type")"
    case "$kind" in *fan*) continue ;; esac # one that turns holds nothing back
    case "$(text_of "$device/cur_state")" in '' | 0 | *[!0-9]*) ;; *) throttled="$throttled, \"${kind:-${device##*/}}\"" ;; esac
  done
  printf '{"temperatures_c": {%s}, "clocks_mhz": {%s}, "throttled": [%s]}' \
    "${heat#, }" "${clocks#, }" "${throttled#, }"
}

power_mode() { # the name that nvpmodel gives the present mode
  number="$(text_of "$root/var/lib/nvpmodel/status" | sed -n 's/.*pmode:0*\([0-9][0-9]*\).*/\1/p')"
  [ -n "$number" ] || { printf unknown && return 0; }
  mode="$(sed -n "s/^ *< *POWER_MODEL  *ID=0*$number  *NAME=\([^ >\"]*\).*/\1/p" \
    "$root/etc/nvpmodel.conf" 2>/dev/null | head -n 1)"
  printf '%s' "${mode:-mode $number}"
}

energy() { # joules of each rail that every line of tegrastats tells: "VDD_IN 4900mW/5000mW", now and the mean
  awk '{told = 0
      for (i = 1; i < NF; i++)
        if ($i ~ /^[A-Za-z][A-Za-z0-9_]*$/ && $i != "NC" && $(i + 1) ~ /^[0-9]+(mW)?\/[0-9]+(mW)?(\/[0-9]+mW)?$/) {
          sum[$i] += $(i + 1) + 0; seen[$i]++; told = 1
        }
      lines += told}
    END {
      for (rail in sum) if (seen[rail] == lines) {
        rails = rails sep sprintf("\"%s\": %.6f", rail, sum[rail] / 1e4); sep = ", "
      }
      if (rails == "") {print "null"; exit}
      printf "{\"seconds\": %.1f, \"samples\": %d, \"joules\": {%s}, \"interval_s\": 0.1, \"source\": \"tegrastats\"}",
        lines / 10, lines, rails
    }' "$work/power"
}

cosine() { # actual, expected: the worst cosine of their rows; the first line of expected is the width
  # Some boards' awk is busybox's without sqrt() and ^, hence Newton's way to a root.
  awk 'function root(x,    r, n) {r = x > 1 ? x : 1; for (n = 0; n < 80; n++) r = (r + x / r) / 2; return r}
    NR == FNR {if (FNR == 1) width = $1; else want[FNR - 1] = $1; wanted = FNR - 1; next}
    {got[FNR] = $1; count = FNR}
    END {
      if (count != wanted || width < 1) {print "-1"; exit}
      worst = 1
      for (i = 1; i <= count; i += width) {
        d = a = b = 0
        for (j = i; j < i + width; j++) {d += got[j] * want[j]; a += got[j] * got[j]; b += want[j] * want[j]}
        c = (a > 0 && b > 0) ? d / root(a) / root(b) : -1
        if (!(c >= -1 && c <= 1.001)) c = -1
        if (c < worst) worst = c
      }
      printf "%.6f", worst
    }' "$2" "$1"
}

agreement() { # actual, neighbours: the mean share of the gallery's nearest rows that are nearest here too
  read -r offset rows width gallery <"$2"
  tail -c "+$((offset + 1))" "$here/$gallery" | od -A n -v -t f4 | awk -v rows="$rows" -v width="$width" '
    FILENAME == ARGV[1] {got[FNR - 1] = $1; count = FNR; next}
    FILENAME == ARGV[2] {if (FNR > 1) near[queries++] = $0; next}
    {
      for (i = 1; i <= NF && row < rows; i++) {
        for (q = 0; q < queries; q++) dot[q] += got[q * width + at] * $i
        if (++at == width) {
          for (q = 0; q < queries; q++) {score[q * rows + row] = dot[q]; dot[q] = 0}
          at = 0; row++
        }
      }
      if (row >= rows) exit
    }
    END {
      if (queries < 1 || count != queries * width || row != rows) {print "-1"; exit}
      for (q = 0; q < queries; q++) {
        wanted = split(near[q], want, " "); hits = 0
        for (k = 1; k <= wanted; k++) {
          best = -1
          for (r = 0; r < rows; r++)
            if (!((q, r) in taken) && (best < 0 || score[q * rows + r] > score[q * rows + best])) best = r
          taken[q, best] = 1
        }
        for (k = 1; k <= wanted; k++) if ((q, want[k]) in taken) hits++
        sum += hits / wanted
      }
      printf "%.4f", sum / queries
    }' "$1" "$2" -
}

build() {
  # shellcheck disable=SC2086 # flags are words
  "$trtexec" "--onnx=$here/$onnx" "--saveEngine=$work/new/engine.plan" "--minShapes=$least" \
    "--optShapes=$usual" "--maxShapes=$most" "--timingCacheFile=$cache" $flags \
    >"$work/new/build.log" 2>&1 && [ -s "$work/new/engine.plan" ]
}

one_engine() { # build, test and time one tower; sets signature, worst, agreed, milliseconds
  precision="$1" onnx="$2" expected="$3" least="$4" usual="$5" most="$6" single="$7" goldens="$8" inputs="$9"
  if [ "$lane" = A ]; then flags=--fp16; else flags=--stronglyTyped; fi
  [ "$lane$precision" = Aint8 ] && flags="$flags --int8 --precisionConstraints=obey"
  if [ "$pins" != - ]; then # a normalization overflows in FP16: its nodes and what passes between them stay FP32
    pairs="$(awk 'NF {printf "%s%s:fp32", sep, $0; sep = ","}' "$beside/$pins")"
    [ "$lane$precision" = Aint8 ] || flags="$flags --precisionConstraints=obey"
    flags="$flags --layerPrecisions=$pairs --layerOutputTypes=$pairs"
  fi
  flags="$flags${asked:+ $asked}"
  usual="$(printf '%s' "$usual" | sed "s/:N/:$usual_batch/g")"
  most="$(printf '%s' "$most" | sed "s/:N/:$largest_batch/g")"
  case "$version" in 8.[0-5].*) flags="$flags --buildOnly" ;; *) flags="$flags --skipInference" ;; esac
  digest="$(sha256sum "$here/$onnx" | cut -d ' ' -f 1)"
  signature="$(printf '%s\n' 1 "$digest" "$version" "$sm" "$l4t" "$flags" "$least" "$usual" "$most" |
    sha256sum | cut -d ' ' -f 1)"
  place="$out/engines/$signature"
  if ! (cd "$place" 2>/dev/null && sha256sum -c engine.sha256 >/dev/null 2>&1); then
    rm -rf "$work/new" "$place"
    mkdir "$work/new"
    cache="$out/timing/$digest-$version-$sm.cache" # of this very file; one of another release is refused
    mkdir -p "$out/timing"
    room="$(df -Pk "$out" 2>/dev/null | awk 'NR == 2 {print $4}')"
    [ "${room:-$((bytes / 1024 + 1024))}" -ge $((bytes / 1024 + 1024)) ] ||
      fail 2 "an engine needs about $((bytes / 1048576 + 1)) MB and $((room / 1024)) MB are free for $out; free some space and begin again"
    if ! build; then
      full && no_space
      [ -s "$cache" ] || return 1
      rm -f "$cache" # it may be what was refused: once more without
      build || return 1
    fi
    (cd "$work/new" && sha256sum engine.plan >engine.sha256) || return 1
    mv "$work/new" "$place" || return 1
  fi
  feeds=
  for pair in $(printf '%s' "$inputs" | tr ',' ' '); do
    feeds="$feeds${feeds:+,}${pair%%:*}:$beside/${pair#*:}"
  done
  # shellcheck disable=SC2086 # flags are words
  "$trtexec" "--loadEngine=$place/engine.plan" "--shapes=$goldens" "--loadInputs=$feeds" --iterations=1 \
    --warmUp=0 --duration=0 $loading "--exportOutput=$work/output.json" >"$work/run.log" 2>&1 || return 1
  { # without sed -i, which POSIX has not
    tr -d '\n\r\t ' <"$work/output.json" | sed 's/.*"name":"embedding"//; s/.*"values":\[//; s/\].*//' |
      tr ',' '\n'
    echo
  } | sed '/^$/d' >"$work/actual" || return 1
  worst="$(cosine "$work/actual" "$beside/$expected")"
  if [ "$neighbours" = - ]; then agreed=null; else agreed="$(agreement "$work/actual" "$beside/$neighbours")"; fi
  timed || return 1
  milliseconds="$(sed -n 's/.*Latency:.*median = \([0-9.]*\) ms.*/\1/p' "$work/time.log" | head -n 1)"
  [ -n "$milliseconds" ]
}

before="$(conditions)"
records='' best='' best_total='' used='' differs=no
for variant in $(printf '%s\n' "$mine" | awk '!seen[$1]++ {print $1}'); do
  printf '%s\n' "$mine" | awk -v v="$variant" '$1 == v' >"$work/towers"
  total=0 status=passed parts=''
  while read -r _ tower _ precision onnx bytes expected pins neighbours least usual most single goldens inputs; do
    say "$variant $tower: build, test, time"
    worst=-1 agreed=null milliseconds=0 signature=''
    if one_engine "$precision" "$onnx" "$expected" "$least" "$usual" "$most" "$single" "$goldens" "$inputs"; then
      used="$used $signature"
      awk -v c="$worst" -v l="$least_cosine" -v a="$agreed" -v m="$least_agreement" \
        'BEGIN {exit !(c + 0 >= l + 0 && (a == "null" || a + 0 >= m + 0))}' || {
        full && no_space
        status="its golden outputs differ here"
        differs=yes
      }
    else
      full && no_space
      status="trtexec failed, see $out/last.log"
      cat "$work"/new/build.log "$work"/run.log "$work"/time.log >"$out/last.log" 2>/dev/null || true
    fi
    total="$(awk -v a="$total" -v b="$milliseconds" 'BEGIN {printf "%.4f", a + b}')"
    parts="$parts${parts:+, }\"$tower\": {\"signature\": \"$signature\", \"worst_cosine\": $worst, \"top_k_agreement\": $agreed, \"b1_ms\": $milliseconds}"
  done <"$work/towers"
  say "$variant: $status, one picture and one text in $total ms"
  records="$records${records:+,
  }{\"variant\": \"$variant\", \"status\": \"$status\", \"total_ms\": $total, \"towers\": {$parts}}"
  if [ "$status" = passed ] && { [ -z "$best" ] ||
    awk -v a="$total" -v b="$best_total" 'BEGIN {exit !(a < b)}'; }; then
    best="$variant" best_total="$total"
  fi
done
[ -n "$best" ] || [ "$differs" = yes ] ||
  fail 1 "trtexec built or ran no candidate; mend what $out/last.log says and begin again"
[ -n "$best" ] || fail 3 "no candidate answers here as it did where the bundle was made; build it for this board anew"

for place in "$out/engines"/*; do
  [ ! -e "$place/engine.json" ] || continue # edgeglm's own, which its receipt names
  case " $used " in *" ${place##*/} "*) ;; *) rm -rf "$place" ;; esac
done
after="$(conditions)"
cat >"$work/receipt" <<END
{
 "schema": 1,
 "bundle": "$name",
 "models_digest": "$content",
 "created": "$(date -u +%Y-%m-%dT%H:%M:%SZ)",
 "board": {"model": "$model", "sm": "$sm", "l4t": "$l4t", "power_mode": "$(power_mode)",
  "memory_bytes": $(bytes_of "${memory:-0}"), "memory_available_bytes": $(bytes_of "${free:-0}")},
 "target": "$target",
 "library": "trtexec",
 "library_version": "$version",
 "lane": "$lane",
 "signature_checked": ${EDGEGLM_SIGNATURE_CHECKED:-false},
 "before": $before,
 "after": $after,
 "energy": $(energy),
 "chosen": "$best",
 "candidates": [
  $records
 ]
}
END
mv "$work/receipt" "$out/receipt-trtexec.json"
say "chosen $best, TensorRT $version, lane $lane; $out/receipt-trtexec.json"
