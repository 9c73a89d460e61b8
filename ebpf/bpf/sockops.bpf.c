/* A connection is established: its two ends find each other by their initial sequence numbers, and enter the map of sockets.
 *
 * Stops: taking strangers for the two ends of one connection (two pods with equal addresses, translated addresses). Touches only sockets
 * that connect() marked and those that accepted from them; everything else leaves after one lookup. Runs in softirq: no uid here.
 */
#include "mesh.h"

#define SOL_SOCKET 1
#define SO_SNDBUF 7

#ifdef OFFSET_COPIED_SEQ
#define TCP_SOCK(sk) ((u64)bpf_skc_to_tcp_sock(sk))
#else
#define TCP_SOCK(sk) 0 /* a kernel without type information: capture alone */
#endif

/* Why TCP is made short: `short` in mesh.h. What the application sets itself afterwards holds. */
static __always_inline void shorten(struct bpf_sock_ops *ctx) {
  int bytes = TCP_BUFFER;
  bpf_setsockopt(ctx, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof(bytes));
}

/* Bytes that the sidecar wrote before the app's socket existed are on their way by TCP: `front` in mesh.h. What cannot be read means
 * that there are some. */
static __always_inline int has_begun(u64 sender, u32 first) {
#ifdef OFFSET_WRITE_SEQ
  u32 written = 0;
  return bpf_probe_read_kernel(&written, 4, (void *)(sender + OFFSET_WRITE_SEQ)) || written != first;
#else
  return 1;
#endif
}

static __always_inline void connected(struct bpf_sock_ops *ctx, struct bpf_sock *sk) {
  struct flow *flow = flows.sk_storage_get(sk, 0, 0);
  if (!flow) return;
  /* snd_una, not snd_nxt: data that went with the SYN and was not taken would move the latter */
  struct end me = {.isns = {.ns = bpf_get_netns_cookie(ctx), .client = ctx->snd_una, .server = ctx->rcv_nxt}, .side = 0};
  int to_app = flow->flags & FLOW_TO_APP;
  struct pair pair = {};
  if (flow->flags & FLOW_ACCELERATE) {
    long failed = socks.sock_hash_update(ctx, &me, BPF_NOEXIST);
    if (failed) {
      count(me.isns.ns, COUNT_BY_TCP_FULL, 1);
      flow->flags &= ~FLOW_ACCELERATE;
    } else if (SHORTENED(flow->flags)) {
      shorten(ctx);
    }
  }
  if (to_app) {
    __builtin_memcpy(&pair.caller, &flow->shown, sizeof(pair.caller));
    __builtin_memset(&flow->shown, 0, sizeof(flow->shown)); /* the sidecar itself keeps seeing the app */
  }
  __builtin_memcpy(&pair.dialled, &flow->dialled, sizeof(pair.dialled));
  pair.sockets[0] = TCP_SOCK(sk);
  pair.flags = flow->flags;
  pair.client_port = ctx->local_port;
  pairs.update(&me.isns, &pair);
  __builtin_memcpy(&flow->peer.isns, &me.isns, sizeof(me.isns));
  flow->peer.side = 1;
  flow->settled = me.isns.client;
}

static __always_inline void accepted(struct bpf_sock_ops *ctx, struct bpf_sock *sk) {
  struct end me = {.isns = {.ns = bpf_get_netns_cookie(ctx), .client = ctx->rcv_nxt, .server = ctx->snd_nxt}, .side = 1};
  struct pair *pair = pairs.lookup(&me.isns);
  if (!pair || pair->flags & FLOW_PAIRED || pair->client_port != bpf_ntohl(ctx->remote_port)) return;
  struct flow *flow = flows.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
  if (!flow) return;
  pair->flags |= FLOW_PAIRED;
  count(me.isns.ns, COUNT_PAIRED, 1);
  __builtin_memcpy(&flow->dialled, &pair->dialled, sizeof(flow->dialled));
  __builtin_memcpy(&flow->shown, &pair->caller, sizeof(flow->shown));
  __builtin_memcpy(&flow->peer.isns, &me.isns, sizeof(me.isns));
  flow->peer.side = 0;
  flow->settled = me.isns.server;
  flow->peer_socket = pair->sockets[0];
  /* what the accepting end sends goes the other way: to the app when the app connected */
  int by_app = pair->flags & FLOW_TO_APP;
  flow->flags = FLOW_ACCEPTED | (by_app ? FLOW_RESUME : FLOW_TO_APP | (pair->flags & FLOW_BACK_RESUME ? FLOW_RESUME : 0));
  int in_front = by_app && SHORTENED(pair->flags) && has_begun(pair->sockets[0], me.isns.client);
  if (!(pair->flags & FLOW_ACCELERATE) || in_front) {
    pairs.delete(&me.isns); /* the other end finds no peer, and stays on TCP */
    return;
  }
  long failed = socks.sock_hash_update(ctx, &me, BPF_NOEXIST);
  if (failed) {
    count(me.isns.ns, COUNT_BY_TCP_FULL, 1);
    return; /* the other end never learns this socket, and stays on TCP */
  }
  flow->flags |= pair->flags & (FLOW_ACCELERATE | FLOW_ONE_WAY);
  if (SHORTENED(flow->flags)) shorten(ctx);
  pair->sockets[1] = TCP_SOCK(sk);
  count(me.isns.ns, COUNT_ACCELERATED, 1);
}

int sockops(struct bpf_sock_ops *ctx) {
  u32 op = ctx->op;
  if (op != BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB && op != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB) return ALLOW;
  struct bpf_sock *sk = (struct bpf_sock *)ctx->sk;
  if (!sk) return ALLOW;
  if (op == BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB)
    connected(ctx, sk);
  else
    accepted(ctx, sk);
  return ALLOW;
}
