# shellcheck shell=bash
# Writes what the components read: certificates, kubeconfigs, configuration files. Once for the life of a cluster.

# certificate NAME SUBJECT SANS: signed by the cluster's CA.
certificate() {
  openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout "$1.key" -out "$1.csr" -subj "$2" 2>/dev/null
  openssl x509 -req -in "$1.csr" -CA ca.crt -CAkey ca.key -CAcreateserial -days 365 -out "$1.crt" \
    -extfile <(printf 'subjectAltName=%s\nextendedKeyUsage=serverAuth,clientAuth' "$3") 2>/dev/null
  rm "$1.csr"
}

# kubeconfig NAME SUBJECT: one identity a component, so that the audit log tells their writes apart.
kubeconfig() {
  certificate "$1" "$2" "${3:-DNS:$1}"
  cat > "$1.kubeconfig" <<Y
apiVersion: v1
kind: Config
clusters: [{name: belay, cluster: {server: "https://$NODE_IP:6443", certificate-authority: $RUN/ca.crt}}]
users: [{name: $1, user: {client-certificate: $RUN/$1.crt, client-key: $RUN/$1.key}}]
contexts: [{name: belay, context: {cluster: belay, user: $1}}]
current-context: belay
Y
}

service_account() { echo "/O=system:serviceaccounts/O=system:serviceaccounts:$1/CN=system:serviceaccount:$1:$2"; }

configure_identities() {
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout ca.key -out ca.crt -days 365 -subj /CN=belay-test-cluster 2>/dev/null
  openssl genrsa -out service-accounts.key 2048 2>/dev/null
  certificate apiserver /CN=kube-apiserver "IP:127.0.0.1,IP:$NODE_IP,IP:$API_SERVICE_IP,DNS:localhost,DNS:kubernetes.default.svc"
  certificate apiserver-client /O=system:masters/CN=kube-apiserver DNS:kube-apiserver
  kubeconfig admin /O=system:masters/CN=admin
  kubeconfig controller-manager /CN=system:kube-controller-manager
  kubeconfig scheduler /CN=system:kube-scheduler
  kubeconfig proxy /CN=system:kube-proxy
  # As on a cluster that Calico was installed on: by the names and groups of its service accounts (their rights are in objects.yaml).
  kubeconfig felix "$(service_account kube-system calico-node)"
  kubeconfig cni "$(service_account kube-system calico-cni-plugin)"
  kubeconfig kubelet "/O=system:nodes/CN=system:node:$NODE" "DNS:$NODE,IP:$NODE_IP"
}

configure_apiserver() {
  # Writes only, without bodies: enough to count who wrote what.
  cat > audit-policy.yaml <<Y
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
  - {level: None, verbs: [get, list, watch]}
  - {level: Metadata}
Y
}

configure_containerd() {
  mkdir -p cni/net.d cni/addresses containerd
  cat > cni/net.d/10-calico.conflist <<Y
{"name": "belay", "cniVersion": "0.3.1", "plugins": [{
  "type": "calico", "datastore_type": "kubernetes", "kubernetes": {"kubeconfig": "$RUN/cni.kubeconfig"},
  "nodename": "$NODE", "nodename_file_optional": true, "mtu": 1400, "log_file_path": "$LOGS/cni.log",
  "ipam": {"type": "host-local", "subnet": "usePodCidr", "dataDir": "$RUN/cni/addresses"}, "policy": {"type": "k8s"}}]}
Y
  cat > runsc.toml <<Y
root = "$RUN/containerd/runsc"
[runsc_config]
platform = "systrap"
overlay2 = "none"
Y
  cat > containerd.toml <<Y
version = 3
root = "$RUN/containerd/root"
state = "$RUN/containerd/state"
[grpc]
address = "$CONTAINERD_SOCKET"
[plugins.'io.containerd.internal.v1.opt']
path = "$RUN/containerd/opt"
[plugins.'io.containerd.nri.v1.nri']
disable = true
[plugins.'io.containerd.cri.v1.images']
snapshotter = "overlayfs"
[plugins.'io.containerd.cri.v1.images'.pinned_images]
sandbox = "localhost/pause:1"
[plugins.'io.containerd.cri.v1.runtime']
# Without CAP_SYS_RESOURCE, oom_score_adj cannot be lowered.
restrict_oom_score_adj = true
# Pods' namespaces under our own folder, so that \`down\` knows them.
netns_mounts_under_state_dir = true
[plugins.'io.containerd.cri.v1.runtime'.cni]
bin_dirs = ["$BIN"]
conf_dir = "$RUN/cni/net.d"
use_internal_loopback = true
[plugins.'io.containerd.cri.v1.runtime'.containerd]
default_runtime_name = "runc"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
BinaryName = "$BIN/runc"
Root = "$RUN/containerd/runc"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runsc]
runtime_type = "io.containerd.runsc.v1"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runsc.options]
TypeUrl = "io.containerd.runsc.v1.options"
ConfigPath = "$RUN/runsc.toml"
Y
}

configure_kubelet() {
  # Images are imported, never pulled: the image garbage collector (100 = off) would delete what nobody can fetch again.
  cat > kubelet.yaml <<Y
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
cgroupDriver: cgroupfs
failCgroupV1: false
failSwapOn: false
containerRuntimeEndpoint: unix://$CONTAINERD_SOCKET
tlsCertFile: $RUN/kubelet.crt
tlsPrivateKeyFile: $RUN/kubelet.key
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: $RUN/ca.crt}}
authorization: {mode: Webhook}
clusterDNS: [10.96.0.10]
clusterDomain: cluster.local
resolvConf: ""
podLogsDir: $RUN/pod-logs
maxPods: 250
kubeAPIQPS: 200
kubeAPIBurst: 400
eventRecordQPS: 100
eventBurst: 200
syncFrequency: 10s
serializeImagePulls: false
imageGCHighThresholdPercent: 100
evictionHard: {memory.available: 100Mi, nodefs.available: 1%, imagefs.available: 1%}
Y
}

configure() {
  cd "$RUN" || return
  [ ! -e configured ] || return 0
  configure_identities
  configure_apiserver
  configure_containerd
  configure_kubelet
  touch configured
}
