/* getpeername() and accept(): whom the app believes to talk to.
 *
 * A captured connection shows the target that the app dialled; a connection from the sidecar shows the caller that the sidecar named.
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
