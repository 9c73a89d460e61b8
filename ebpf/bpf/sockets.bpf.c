/* socket(): no kind of TCP that connect() hooks do not see.
 *
 * Stops: leaving through MPTCP, which is TCP on the wire and never calls the hooks of connect.bpf.c. The error is the one of a kernel
 * without MPTCP, so that runtimes which prefer it (Go's listeners) take TCP.
 */
#include "mesh.h"

#define IPPROTO_MPTCP 262

int sockets(struct bpf_sock *ctx) {
  if (ctx->protocol != IPPROTO_MPTCP) return ALLOW;
  u64 ns = bpf_get_netns_cookie(ctx);
  if (!pods.lookup(&ns)) return ALLOW;
  count(ns, COUNT_REFUSED_SOCKETS, 1);
  set_errno(-EPROTONOSUPPORT);
  return REFUSE;
}
