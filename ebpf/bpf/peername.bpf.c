/* getpeername(), accept() and getsockname(): whom the app believes to talk to, and from where.
 *
 * A captured connection shows the target that the app dialled, and the pod's address as its own: apps tell others where they are by what
 * getsockname() says (Redis Sentinel, FTP). A connection from the sidecar shows the caller that the sidecar named.
 * Only what is shown changes: routing, `ss` and /proc/net/tcp keep the loopback pair.
 */
#include "mesh.h"

static __always_inline struct flow *shown(struct bpf_sock_addr *ctx) {
  struct bpf_sock *sk = (struct bpf_sock *)ctx->sk;
  return sk ? flows.sk_storage_get(sk, 0, 0) : 0;
}

int getpeername4(struct bpf_sock_addr *ctx) {
  struct flow *flow = shown(ctx);
  if (flow && flow->shown.family == AF_INET) {
    ctx->user_ip4 = flow->shown.ip[0];
    APART();
    ctx->user_port = flow->shown.port;
  }
  return ALLOW;
}

int getpeername6(struct bpf_sock_addr *ctx) {
  struct flow *flow = shown(ctx);
  if (!flow || !flow->shown.family) return ALLOW;
  int v4 = flow->shown.family == AF_INET;
  ctx->user_ip6[0] = v4 ? 0 : flow->shown.ip[0];
  APART();
  ctx->user_ip6[1] = v4 ? 0 : flow->shown.ip[1];
  APART();
  ctx->user_ip6[2] = v4 ? V4_MAPPED : flow->shown.ip[2];
  APART();
  ctx->user_ip6[3] = v4 ? flow->shown.ip[0] : flow->shown.ip[3];
  APART();
  ctx->user_port = flow->shown.port;
  return ALLOW;
}

/* The pod of a captured connection's connecting end, else none. Who proves capture knows its connection at both ends by the true pair. */
static __always_inline struct pod *captured(struct bpf_sock_addr *ctx) {
  struct flow *flow = shown(ctx);
  if (!flow || !(flow->flags & FLOW_CAPTURED)) return 0;
  u64 ns = bpf_get_netns_cookie(ctx);
  struct pod *pod = pods.lookup(&ns);
  return pod && !is_proof(pod, &flow->dialled, bpf_ntohs(flow->dialled.port)) ? pod : 0;
}

/* What is not loopback was chosen by the app, with bind(). */
int getsockname4(struct bpf_sock_addr *ctx) {
  struct pod *pod = captured(ctx);
  if (pod && READ(ctx->user_ip4) == V4_LOOPBACK) ctx->user_ip4 = pod->own4[0];
  return ALLOW;
}

int getsockname6(struct bpf_sock_addr *ctx) {
  struct pod *pod = captured(ctx);
  if (!pod) return ALLOW;
  u32 i0 = READ(ctx->user_ip6[0]), i1 = READ(ctx->user_ip6[1]), i2 = READ(ctx->user_ip6[2]), i3 = READ(ctx->user_ip6[3]);
  if (i0 || i1) return ALLOW;
  if (i2 == V4_MAPPED && i3 == V4_LOOPBACK) {
    ctx->user_ip6[3] = pod->own4[0];
  } else if (!i2 && i3 == V6_LOOPBACK_END) {
    ctx->user_ip6[0] = pod->own6[0][0];
    APART();
    ctx->user_ip6[1] = pod->own6[0][1];
    APART();
    ctx->user_ip6[2] = pod->own6[0][2];
    APART();
    ctx->user_ip6[3] = pod->own6[0][3];
  }
  return ALLOW;
}
