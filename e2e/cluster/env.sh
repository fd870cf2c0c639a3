# shellcheck shell=bash disable=SC2034 # sourced: every name here is used by a sibling script
# What every script of the test cluster shares: pinned versions, paths, addresses, and how a message looks.

# --- Versions. A tool is rebuilt when its version here, or its recipe in `build`, changes, and only then.
KUBERNETES=v1.36.3           # kube's `k8s-openapi` feature in Cargo.toml must be no newer
KUBERNETES_STAGING=v0.36.3   # the same release of the k8s.io/* modules
ETCD=v3.6.11
CONTAINERD=v2.4.2
RUNC=v1.5.2
GVISOR=v0.0.0-20260905035102-160fafc42237
CNI_PLUGINS=v1.9.1
# Calico 3.28.5, the newest whose modules pass the checksum database. Its hcsshim is not served, so a served one is required.
CALICO=v1.11.0-cni-plugin.0.20250813170300-a0db560f0520
CALICO_API=v0.0.0-20240708202104-e3f70b269c2c
CALICO_HCSSHIM=v0.12.9
VERSITYGW=v1.8.0
SEAWEEDFS=4.48
HELM=v4.3.1
KUBECONFORM=v0.8.0
PROMETHEUS=v0.316.0
OTELCOL=v0.165.0
OTELCOL_CONFMAP=v1.71.0      # the same release of the collector's stable modules
TESSERA=v1.0.4
GO_AT_LEAST=1.26

# Debian packages that `up` installs when they are absent.
DEBIAN_PACKAGES=(iproute2 iptables ipset conntrack busybox-static openssl libseccomp-dev gcc util-linux procps curl python3 python3-pip)

# --- Paths. Nothing is written outside the cache but what the kernel and the CNI library insist on (see README.md).
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CACHE=$(realpath -m "${BELAY_CACHE:-$HOME/.cache/belay}")
BIN=$CACHE/bin               # links to the pinned version of every tool
RUN=$CACHE/cluster           # the running cluster; removed by `down`
LOGS=$CACHE/logs             # one file a component; kept by `down`
OWNER=/run/lock/belay-cluster  # locks the machine's one cluster, and says whose it is: the namespaces' names are taken once
ADMIN=$RUN/admin.kubeconfig
CONTAINERD_SOCKET=$RUN/containerd/containerd.sock

# --- The two network namespaces: the node, and a host that plays the internet.
NODE=belay-node NODE_IP=10.200.0.10
WORLD=belay-world WORLD_IP=10.200.0.20
POD_CIDR=10.244.0.0/16 SERVICE_CIDR=10.96.0.0/16 API_SERVICE_IP=10.96.0.1
VERSITYGW_IP=198.51.100.30 SEAWEED_IP=198.51.100.31
# What the world answers on: its web front, its S3 stores and DNS, and the addresses that an escaping agent would aim at. They
# are all real, so that a test's control run succeeds and a refusal is therefore a refusal.
WORLD_ADDRESSES=(198.51.100.20 "$VERSITYGW_IP" "$SEAWEED_IP" 198.51.100.53 8.8.8.8 1.1.1.1 169.254.169.254 10.0.0.5 100.64.0.1)
WORLD_ADDRESS_6=2001:4860:4860::8888

# --- Messages.
step() { printf '%4ds  %s\n' "$SECONDS" "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# Runs a command in one of our network namespaces. Not `ip netns exec`: that remounts /sys and hides the cgroups from the kubelet.
inside() { local netns=$1; shift; nsenter --net="/run/netns/$netns" -- "$@"; }

# lock FILE: holds FILE for the life of this script, so that two runs at once are safe. Whatever outlives the script is started with
# `8>&- 9>&-`, or it would hold the lock as well.
lock() {
  local fd=8; [ "$1" != "$OWNER" ] || fd=9
  mkdir -p "$(dirname "$1")"
  eval "exec $fd>>\"\$1\""
  flock -n "$fd" && return
  step "waiting for another run to release $1"
  flock -w 3600 "$fd" || die "another run still holds $1 after an hour; \`fuser $1\` tells which"
}

# The machine has one cluster: takes its lock, and refuses when one that was started from another cache is running. Of one that has
# died, with its session or its machine, the remains are cleared.
lock_cluster() {
  lock "$OWNER"
  local other; other=$(cat "$OWNER")
  [ -n "$other" ] && [ "$other" != "$RUN" ] && [ -d "$other" ] || return 0
  local cache; cache=$(dirname "$other")
  if RUN=$other any_alive; then
    die "a cluster of another cache is running, $other; end it first with BELAY_CACHE=$cache $HERE/down"
  fi
  step "clearing the remains of a cluster of another cache, $other"
  BELAY_CACHE=$cache BELAY_LOCKED=1 "$HERE/down"
}
