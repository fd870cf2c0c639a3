# shellcheck shell=bash disable=SC2034 # sourced: names are used by the sibling scripts
# What the image scripts share: where things lie, what has to be installed, how buildah is called.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
CACHE=${BELAY_CACHE:-$HOME/.cache/belay}
IMAGES=$CACHE/images
LOGS=$CACHE/logs
# Where the Rust toolchain of this machine appears in the build container.
RUST_MOUNT=/usr/local/rust
DEBIAN_PACKAGES=(buildah mmdebstrap)

mkdir -p "$IMAGES/storage" "$IMAGES/run" "$IMAGES/tmp" "$LOGS"
# The jobserver of a `make` that calls us is not passed down; cargo would warn that it is not there.
unset MAKEFLAGS MFLAGS
# buildah keeps its `--mount=type=cache` folders below TMPDIR; /var/tmp may be emptied, and a cold build takes minutes.
export TMPDIR=$IMAGES/tmp

step() { printf '%4ds  %s\n' "$SECONDS" "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }
digest() { sha256sum | head -c 12; }

# logged NAME CMD…: its output goes to a log, whose end is shown when it fails.
logged() {
  local log=$LOGS/image-$1.log; shift
  "$@" > "$log" 2>&1 && return
  printf '\nerror: this failed: %s\nThe last lines of %s:\n' "$*" "$log" >&2
  tail -n 30 "$log" | sed 's/^/  | /' >&2
  exit 1
}

# vfs and chroot: they need neither overlayfs, nor user namespaces, nor a container runtime.
buildah() { command buildah --storage-driver vfs --root "$IMAGES/storage" --runroot "$IMAGES/run" "$@"; }
