/* connect(): the app's connections lead to its sidecar; both hops of the pod are marked for pairing.
 *
 * Stops: reaching the network around the sidecar. Leaves alone: the sidecar's own uid (but for the connection that proves capture), loopback
 * and the pod's own addresses, skipped ports, other namespaces under the same cgroup, everything that is not TCP. Runs in the caller's
 * context, once a connection.
 */
#include "mesh.h"

enum where { LEAVE, TO_SIDECAR, NOWHERE };

/* A socket may be connected again (AF_UNSPEC undoes connect): what the last connection left behind must not describe this one. */
static __always_inline void begin(struct flow *flow, u32 flags) {
  flow->peer_socket = 0;
  flow->settled = 0;
  flow->flags = flags;
  __builtin_memset(&flow->dialled, 0, sizeof(flow->dialled));
  __builtin_memset(&flow->peer, 0, sizeof(flow->peer));
}

static __always_inline enum where decide(struct bpf_sock_addr *ctx, struct addr *to, u32 *out_port) {
  u64 ns = bpf_get_netns_cookie(ctx);
  struct pod *pod = pods.lookup(&ns);
  if (!pod) return LEAVE;
  struct bpf_sock *sk = (struct bpf_sock *)ctx->sk;
  if (!sk) return NOWHERE;
  u32 flags = pod->flags, port = bpf_ntohs(to->port);
  int sidecar = (u32)bpf_get_current_uid_gid() == pod->uid && !is_proof(pod, to, port);
  int own = is_own(pod, to);
  u32 accelerate = (flags & POD_ACCELERATE) && !in_port_set(ns, PORTS_NOT_ACCELERATED, port) ? FLOW_ACCELERATE : 0;
  if (accelerate && flags & POD_ONE_WAY) accelerate |= FLOW_ONE_WAY;
  struct flow *flow = flows.sk_storage_get(sk, 0, 0);

  if (sidecar && own) { /* to the app; `shown` is the caller, when the sidecar said one */
    if (!flow && accelerate) flow = flows.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
    if (flow) begin(flow, accelerate | FLOW_TO_APP | (flags & POD_RESUME ? FLOW_RESUME : 0));
    return LEAVE;
  }
  if (sidecar || own || in_port_set(ns, PORTS_SKIP_OUTBOUND, port)) {
    if (flow) flows.sk_storage_delete(sk);
    return LEAVE;
  }
  if (flags & POD_REFUSE) {
    count(ns, COUNT_REFUSED_OUTBOUND, 1);
    return NOWHERE;
  }
  if (!(flags & (POD_CAPTURE | POD_TRANSLATED))) return LEAVE;
  if (!flow) flow = flows.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
  if (!flow) {
    if (!(flags & POD_CAPTURE)) return LEAVE; /* nftables captures it */
    count(ns, COUNT_REFUSED_OUTBOUND, 1);
    return NOWHERE;
  }
  begin(flow, accelerate | FLOW_RESUME | (flags & POD_RESUME ? FLOW_BACK_RESUME : 0));
  __builtin_memset(&flow->shown, 0, sizeof(flow->shown));
  if (!(flags & POD_CAPTURE)) return LEAVE;
  flow->flags |= FLOW_CAPTURED;
  __builtin_memcpy(&flow->dialled, to, sizeof(*to));
  __builtin_memcpy(&flow->shown, to, sizeof(*to));
  *out_port = pod->out_port;
  count(ns, COUNT_CAPTURED, 1);
  return TO_SIDECAR;
}

int connect4(struct bpf_sock_addr *ctx) {
  if (ctx->protocol != IPPROTO_TCP) return ALLOW;
  struct addr to = {.family = AF_INET, .port = (u16)READ(ctx->user_port), .ip = {READ(ctx->user_ip4)}};
  u32 out_port = 0;
  switch (decide(ctx, &to, &out_port)) {
  case NOWHERE:
    set_errno(-ECONNREFUSED);
    return REFUSE;
  case TO_SIDECAR:
    ctx->user_ip4 = V4_LOOPBACK;
    APART();
    ctx->user_port = bpf_htons((u16)out_port);
  default:
    return ALLOW;
  }
}

int connect6(struct bpf_sock_addr *ctx) {
  if (ctx->protocol != IPPROTO_TCP) return ALLOW;
  u32 i0 = READ(ctx->user_ip6[0]), i1 = READ(ctx->user_ip6[1]), i2 = READ(ctx->user_ip6[2]), i3 = READ(ctx->user_ip6[3]);
  int mapped = !i0 && !i1 && i2 == V4_MAPPED;
  struct addr to = {.family = AF_INET6, .port = (u16)READ(ctx->user_port), .ip = {i0, i1, i2, i3}};
  if (mapped) {
    to.family = AF_INET;
    to.ip[0] = i3;
    to.ip[2] = 0;
    to.ip[3] = 0;
  }
  u32 out_port = 0;
  switch (decide(ctx, &to, &out_port)) {
  case NOWHERE:
    set_errno(-ECONNREFUSED);
    return REFUSE;
  case TO_SIDECAR:
    if (mapped) {
      ctx->user_ip6[3] = V4_LOOPBACK;
    } else {
      ctx->user_ip6[0] = 0;
      APART();
      ctx->user_ip6[1] = 0;
      APART();
      ctx->user_ip6[2] = 0;
      APART();
      ctx->user_ip6[3] = V6_LOOPBACK_END;
    }
    APART();
    ctx->user_port = bpf_htons((u16)out_port);
  default:
    return ALLOW;
  }
}
