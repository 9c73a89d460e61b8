/* Socket options between sidecar and kernel: SO_ORIGINAL_DST of a captured connection, and two private ones (core/capture.py).
 *
 * The first answers as conntrack would, so that the sidecar asks the same question under every way of capture. The one that names the
 * caller is taken from the sidecar's uid in its own registered namespace only: anybody else could forge callers, and gets EPERM. The one
 * that says how much the app has not read yet (`pace` in mesh.h) tells about the asker's own connection, and nothing is decided by it here.
 */
#include "mesh.h"

#define SOL_IP 0
#define SOL_IPV6 41
#define SO_ORIGINAL_DST 80
#define IP6T_SO_ORIGINAL_DST 80
#define CALLER_LEVEL 0x50
#define CALLER_OPTION 1
#define UNREAD_OPTION 2
#define HANDLED (-1) /* as optlen: the kernel skips its own handling */
#define PAGE 4096

struct in4 {
  u16 family;
  u16 port;
  u32 ip;
  u64 zero;
};
struct in6 {
  u16 family;
  u16 port;
  u32 flow;
  u32 ip[4];
  u32 scope;
};

#ifdef OFFSET_COPIED_SEQ
/* How much of what this socket sent waits in the queue of its peer, which is the app. 0 as long as bytes travel by TCP, which stops us by
 * itself; also when the peer is gone, and its memory is somebody else's: then the sequence numbers do not agree. */
static __always_inline int tell_unread(struct bpf_sockopt *ctx) {
  struct bpf_sock *sk = (struct bpf_sock *)ctx->sk;
  if (!sk) return ALLOW;
  struct flow *flow = flows.sk_storage_get(sk, 0, 0);
  if (!flow || !(flow->flags & FLOW_TO_APP) || !SHORTENED(flow->flags)) return ALLOW;
  int *value = ctx->optval, unread = 0;
  if ((void *)(value + 1) > ctx->optval_end) return ALLOW;
  struct bpf_tcp_sock *me = bpf_tcp_sock(sk);
  u64 peer = flow->peer_socket;
  u32 copied_seq = 0;
  if (me && peer && !bpf_probe_read_kernel(&copied_seq, 4, (void *)(peer + OFFSET_COPIED_SEQ)) && copied_seq == me->snd_nxt &&
      bpf_probe_read_kernel(&unread, 4, (void *)(peer + OFFSET_RMEM_ALLOC)))
    unread = 0;
  *value = unread;
  ctx->optlen = sizeof(*value);
  APART();
  ctx->retval = 0;
  return ALLOW;
}
#endif

int getsockopt(struct bpf_sockopt *ctx) {
  if (ctx->optlen > PAGE) ctx->optlen = 0; /* the kernel copied one page only: 0 leaves the buffer as the kernel filled it */
#ifdef OFFSET_COPIED_SEQ
  if (ctx->level == CALLER_LEVEL && ctx->optname == UNREAD_OPTION) return tell_unread(ctx);
#endif
  if (ctx->optname != SO_ORIGINAL_DST || (ctx->level != SOL_IP && ctx->level != SOL_IPV6)) return ALLOW;
  struct bpf_sock *sk = (struct bpf_sock *)ctx->sk;
  if (!sk) return ALLOW;
  struct flow *flow = flows.sk_storage_get(sk, 0, 0);
  if (!flow || !(flow->flags & FLOW_ACCEPTED)) return ALLOW;
  void *value = ctx->optval, *end = ctx->optval_end;
  if (flow->dialled.family == AF_INET && ctx->level == SOL_IP) {
    struct in4 *in = value;
    if ((void *)(in + 1) > end) return ALLOW;
    in->family = AF_INET;
    in->port = flow->dialled.port;
    in->ip = flow->dialled.ip[0];
    in->zero = 0;
    ctx->optlen = 16;
  } else if (flow->dialled.family == AF_INET6 && ctx->level == SOL_IPV6) {
    struct in6 *in = value;
    if ((void *)(in + 1) > end) return ALLOW;
    in->family = AF_INET6;
    in->port = flow->dialled.port;
    in->flow = 0;
    in->ip[0] = flow->dialled.ip[0];
    in->ip[1] = flow->dialled.ip[1];
    in->ip[2] = flow->dialled.ip[2];
    in->ip[3] = flow->dialled.ip[3];
    in->scope = 0;
    ctx->optlen = 28;
  } else {
    return ALLOW;
  }
  APART();
  ctx->retval = 0;
  count(bpf_get_netns_cookie(ctx), COUNT_ORIGINAL_DST, 1);
  return ALLOW;
}

int setsockopt(struct bpf_sockopt *ctx) {
  if (ctx->level != CALLER_LEVEL) {
    if (ctx->optlen > PAGE) ctx->optlen = 0; /* the kernel copied one page only: 0 makes it read the caller's own buffer */
    return ALLOW;
  }
  u64 ns = bpf_get_netns_cookie(ctx);
  struct pod *pod = pods.lookup(&ns);
  struct bpf_sock *sk = (struct bpf_sock *)ctx->sk;
  if (!pod || !sk) return ALLOW; /* the kernel knows no such level: ENOPROTOOPT */
  struct addr *caller = ctx->optval;
  if (ctx->optname != CALLER_OPTION || !(pod->flags & POD_CALLER) || (u32)bpf_get_current_uid_gid() != pod->uid ||
      (void *)(caller + 1) > ctx->optval_end || (caller->family != AF_INET && caller->family != AF_INET6) || sk->protocol != IPPROTO_TCP) {
    count(ns, COUNT_REFUSED_CALLERS, 1);
    return REFUSE;
  }
  struct flow *flow = flows.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
  if (!flow) return REFUSE;
  flow->shown.family = caller->family;
  flow->shown.port = caller->port;
  flow->shown.ip[0] = caller->ip[0];
  flow->shown.ip[1] = caller->ip[1];
  flow->shown.ip[2] = caller->ip[2];
  flow->shown.ip[3] = caller->ip[3];
  count(ns, COUNT_CALLERS, 1);
  ctx->optlen = HANDLED;
  return ALLOW;
}
