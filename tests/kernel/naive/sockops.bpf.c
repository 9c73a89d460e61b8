/* FIXTURE, unsafe on purpose: ends are found by addresses, without their namespace. Any other connection with the same addresses wins. */
#include "mesh.h"

int sockops(struct bpf_sock_ops *ctx) {
  u32 op = ctx->op;
  if (op != BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB && op != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB) return ALLOW;
  if (ctx->family != AF_INET) return ALLOW;
  u32 local = ctx->local_port, remote = bpf_ntohl(ctx->remote_port);
  struct end me = {.isns = {.ns = (u64)READ(ctx->local_ip4) << 32 | READ(ctx->remote_ip4), .client = local, .server = remote}};
  long failed = socks.sock_hash_update(ctx, &me, BPF_ANY);
  if (!failed) count(bpf_get_netns_cookie(ctx), COUNT_ACCELERATED, 1);
  return ALLOW;
}
