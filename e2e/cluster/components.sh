# shellcheck shell=bash disable=SC2034
# Long-running components: start them once, know whether they live, end them. Each is recorded in $RUN/pids/NAME as
# "PID STARTTIME"; the start time tells our process from a stranger that was given the same pid later.

COMPONENTS=(etcd apiserver controller-manager scheduler containerd kubelet proxy felix versitygw seaweedfs)

# Nothing for a process that has ended, though nobody may have reaped it yet.
start_time() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | awk '$1 != "Z" {print $20}'; }

pid_of() {
  local pid since
  read -r pid since 2>/dev/null < "$RUN/pids/$1" && [ "$since" = "$(start_time "$pid")" ] && echo "$pid"
}

alive() { pid_of "$1" >/dev/null; }
any_alive() { local name; for name in "${COMPONENTS[@]}"; do ! alive "$name" || return 0; done; return 1; }

# start NAME NETNS CMD…: does nothing when NAME lives already.
start() {
  local name=$1 netns=$2 pid; shift 2
  alive "$name" && return
  mkdir -p "$RUN/pids" "$LOGS"
  [ ! -e "$RUN/pids/$name" ] || step "$name has died: starting it again"
  printf -- '--- %s: %s\n' "$(date -u +%FT%TZ)" "$*" >> "$LOGS/$name.log"
  setsid nsenter --net="/run/netns/$netns" -- "$@" </dev/null >> "$LOGS/$name.log" 2>&1 8>&- 9>&- &
  pid=$!
  echo "$pid $(start_time "$pid")" > "$RUN/pids/$name"
}

# await NAME SECONDS CMD…: waits until CMD succeeds, and gives up as soon as NAME dies.
await() {
  local name=$1 limit=$2 until=$((SECONDS + $2)); shift 2
  until "$@" >/dev/null 2>&1; do
    alive "$name" || fail "$name" "ended while it was starting"
    [ "$SECONDS" -lt "$until" ] || fail "$name" "was not ready after ${limit}s"
    sleep 0.1
  done
}

fail() {
  printf '\nerror: %s %s. The last lines of %s:\n' "$1" "$2" "$LOGS/$1.log" >&2
  tail -n 15 "$LOGS/$1.log" | cut -c1-400 | sed 's/^/  | /' >&2
  printf 'All logs are in %s. Start again with %s/up; end everything with %s/down.\n' "$LOGS" "$HERE" "$HERE" >&2
  exit 1
}

# stop NAME…: TERM to all, then KILL to those that are still there after five seconds.
stop() {
  local name pid
  for name; do pid=$(pid_of "$name") && kill "$pid" 2>/dev/null; done
  for name; do
    for _ in $(seq 50); do alive "$name" || break; sleep 0.1; done
    pid=$(pid_of "$name") && kill -KILL "$pid" 2>/dev/null
    rm -f "$RUN/pids/$name"
  done
}
