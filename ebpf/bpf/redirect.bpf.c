/* A message is sent: straight into the peer's queue, or by TCP. The order-and-memory check stands in front of every single message.
 *
 * Stops: reordering, and a writer filling kernel memory because its reader does not read (both argued in mesh.h). Every doubt means TCP.
 */
#include "mesh.h"

#define WAITERS_MAX 4

static __always_inline int by_tcp(u64 ns, u32 cause) {
  count(ns, cause, 1);
  return SK_PASS;
}

/* May the peer's application be inside TCP's recv(2)? Whatever cannot be read means yes. */
static __always_inline int reads_tcp(u64 peer) {
  int owned = 0;
  u64 queue = 0, at = 0, wake = 0;
  if (bpf_probe_read_kernel(&owned, 4, (void *)(peer + OFFSET_OWNED)) || owned) return 1;
  if (bpf_probe_read_kernel(&queue, 8, (void *)(peer + OFFSET_WAITERS)) || !queue) return 1;
  queue += OFFSET_WAITERS_HEAD;
  if (bpf_probe_read_kernel(&at, 8, (void *)queue)) return 1;
#pragma unroll
  for (int i = 0; i < WAITERS_MAX; i++) {
    if (at == queue) return 0;
    if (bpf_probe_read_kernel(&wake, 8, (void *)(at - OFFSET_WAITER_ENTRY + OFFSET_WAITER_FUNC))) return 1;
    if (!BLOCKED_READER || wake == BLOCKED_READER) return 1;
    if (bpf_probe_read_kernel(&at, 8, (void *)at)) return 1;
  }
  return at != queue;
}

int redirect(struct sk_msg_md *msg) {
  struct bpf_sock *sk = (struct bpf_sock *)msg->sk;
  if (!sk) return SK_PASS;
  struct flow *flow = flows.sk_storage_get(sk, 0, 0);
  if (!flow || !SHORTENED(flow->flags)) return SK_PASS;
  u64 ns = flow->peer.isns.ns;
  if (!flow->peer_socket) {
    struct pair *pair = pairs.lookup(&flow->peer.isns);
    if (pair) flow->peer_socket = pair->sockets[1];
    if (!flow->peer_socket) return by_tcp(ns, COUNT_BY_TCP_UNPAIRED);
    struct isns isns;
    __builtin_memcpy(&isns, &flow->peer.isns, sizeof(isns));
    pairs.delete(&isns);
  }
  void *me = bpf_skc_to_tcp_sock(sk);
  u32 copied_seq = 0;
  int unread = 0;
  if (!me || bpf_probe_read_kernel(&copied_seq, 4, (void *)(flow->peer_socket + OFFSET_COPIED_SEQ)) ||
      copied_seq != *(u32 *)(me + OFFSET_WRITE_SEQ))
    return by_tcp(ns, COUNT_BY_TCP_ORDER);
  if (copied_seq != flow->settled) {
    if (!(flow->flags & FLOW_RESUME) && reads_tcp(flow->peer_socket)) return by_tcp(ns, COUNT_BY_TCP_ORDER);
    flow->settled = copied_seq;
  }
  if (bpf_probe_read_kernel(&unread, 4, (void *)(flow->peer_socket + OFFSET_RMEM_ALLOC)) || unread > QUEUE_LIMIT)
    return by_tcp(ns, COUNT_BY_TCP_MEMORY);
  struct end peer;
  __builtin_memcpy(&peer, &flow->peer, sizeof(peer));
  u32 size = msg->size;
  if (socks.msg_redirect_hash(msg, &peer, BPF_F_INGRESS) != SK_PASS) return by_tcp(ns, COUNT_BY_TCP_UNPAIRED);
  struct counters *c = counters.lookup(&ns);
  if (c) {
    __sync_fetch_and_add(&c->of[COUNT_MESSAGES], 1);
    __sync_fetch_and_add(&c->of[COUNT_BYTES], size);
  }
  return SK_PASS;
}
