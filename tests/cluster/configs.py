"""Arguments and configuration files of the test cluster's programs, as text to fill in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

KUBECONFIG = """apiVersion: v1
kind: Config
clusters: [{{name: here, cluster: {{server: "{server}", certificate-authority: {pki}/ca.crt}}}}]
users: [{{name: user, user: {{client-certificate: {pki}/{user}.crt, client-key: {pki}/{user}.key}}}}]
contexts: [{{name: here, context: {{cluster: here, user: user}}}}]
current-context: here
"""

# restrict_oom_score_adj: a root without CAP_SYS_RESOURCE cannot lower the score; containers then fail with "can't get final child's PID"
CONTAINERD = """version = 2
root = "{folder}/containerd"
state = "{folder}/containerd-state"
[grpc]
  address = "{folder}/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{folder}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
    Root = "{folder}/runc"
"""

# what Pillion's components ask of the API server: the test of their rights reads it
AUDIT = """apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- level: Metadata
  userGroups: ["system:serviceaccounts:pillion"]
- level: None
"""

KUBELET = """apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
cgroupDriver: cgroupfs
cgroupRoot: /{cgroup}
failCgroupV1: false
failSwapOn: false
enforceNodeAllocatable: []
containerRuntimeEndpoint: unix://{folder}/containerd.sock
clusterDNS: [{dns}]
clusterDomain: cluster.local
authentication: {{anonymous: {{enabled: false}}, webhook: {{enabled: true}}, x509: {{clientCAFile: {state}/pki/ca.crt}}}}
authorization: {{mode: Webhook}}
tlsCertFile: {state}/pki/node{number}.crt
tlsPrivateKeyFile: {state}/pki/node{number}.key
resolvConf: ""
evictionHard: {{memory.available: 100Mi, nodefs.available: "1%", imagefs.available: "1%", nodefs.inodesFree: "1%"}}
imageGCHighThresholdPercent: 100
serializeImagePulls: false
maxPods: 250
syncFrequency: 10s
volumePluginDir: {folder}/plugins
podLogsDir: {folder}/pod-logs
"""


def CNI(folder: Path, pods: str) -> dict[str, Any]:
    """Debian's bridge plugin, hairpin on so that a pod reaches itself through its Service."""
    ranges = [[{"subnet": pods}]]
    ipam = {"type": "host-local", "dataDir": f"{folder}/ipam", "ranges": ranges, "routes": [{"dst": "0.0.0.0/0"}]}
    bridge = {"type": "bridge", "bridge": "cni0", "isGateway": True, "ipMasq": False, "hairpinMode": True, "ipam": ipam}
    return {"cniVersion": "1.0.0", "name": "pods", "plugins": [bridge, {"type": "portmap", "capabilities": {"portMappings": True}}]}


def flags(text: str, **values: Any) -> list[str]:
    """One argument a line or several; values with white space are not needed here."""
    return text.format(**values).split()


ETCD = """
--data-dir=etcd --unsafe-no-fsync --log-level=warn
--listen-client-urls=http://127.0.0.1:2379 --advertise-client-urls=http://127.0.0.1:2379 --listen-peer-urls=http://127.0.0.1:2380
"""

API_SERVER = """
--etcd-servers=http://127.0.0.1:2379 --service-cluster-ip-range={services} --advertise-address={address} --shutdown-delay-duration=0s
--tls-cert-file=pki/apiserver.crt --tls-private-key-file=pki/apiserver.key --client-ca-file=pki/ca.crt
--authorization-mode=Node,RBAC --allow-privileged=true --enable-admission-plugins=NodeRestriction
--service-account-issuer=https://kubernetes.default.svc.cluster.local
--service-account-key-file=pki/sa.pub --service-account-signing-key-file=pki/sa.key
--kubelet-client-certificate=pki/admin.crt --kubelet-client-key=pki/admin.key --kubelet-preferred-address-types=InternalIP
--requestheader-client-ca-file=pki/ca.crt --requestheader-allowed-names=front-proxy
--proxy-client-cert-file=pki/front-proxy.crt --proxy-client-key-file=pki/front-proxy.key
--requestheader-username-headers=X-Remote-User --requestheader-group-headers=X-Remote-Group
--requestheader-extra-headers-prefix=X-Remote-Extra-
--audit-policy-file=audit.yaml --audit-log-path=log/audit.log --audit-log-maxbackup=1 --audit-log-maxsize=100
"""

_AS = (
    "--kubeconfig={0}.kubeconfig --authentication-kubeconfig={0}.kubeconfig --authorization-kubeconfig={0}.kubeconfig --leader-elect=false"
)
SCHEDULER = _AS.format("scheduler")
CONTROLLER_MANAGER = (
    _AS.format("controller-manager")
    + """
--service-account-private-key-file=pki/sa.key --root-ca-file=pki/ca.crt --use-service-account-credentials
--cluster-signing-cert-file=pki/ca.crt --cluster-signing-key-file=pki/ca.key
"""
)

KUBELET_FLAGS = """
--config={folder}/kubelet.yaml --kubeconfig=node{number}.kubeconfig --root-dir={folder}/kubelet --cert-dir={folder}/kubelet-pki
--hostname-override=node{number} --node-ip={address}
"""

KUBE_PROXY = """
--kubeconfig=kube-proxy.kubeconfig --cluster-cidr=10.244.0.0/16 --hostname-override=node{number}
--proxy-mode=iptables --conntrack-max-per-core=0 --iptables-min-sync-period=200ms
"""
