/* FIXTURE, unsafe on purpose: every message is redirected, whatever the peer has not read yet. */
#include "mesh.h"

int redirect(struct sk_msg_md *msg) {
  struct end peer = {.isns = {.ns = (u64)READ(msg->remote_ip4) << 32 | READ(msg->local_ip4), .client = bpf_ntohl(msg->remote_port)}};
  peer.isns.server = msg->local_port;
  if (socks.msg_redirect_hash(msg, &peer, BPF_F_INGRESS) == SK_PASS) count(bpf_get_netns_cookie(msg), COUNT_MESSAGES, 1);
  return SK_PASS;
}
