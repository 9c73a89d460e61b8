/* A connection arrives: it goes to the sidecar's listener, whatever port it is for; the app's own listeners are not asked.
 *
 * Stops: reaching the app around its sidecar. The pod's own connections pass: the sidecar's hop to the app, and an app that calls itself.
 * They come over loopback, or from one of the pod's own addresses; for those the kernel reports the interface that has the address, not
 * loopback. From outside nobody connects with such a source: IPv4 drops it (a martian), and over IPv6 the answers never leave the pod, so
 * that a handshake would take guessing 32 bits against a reset. Without a listener the caller gets a reset. One loaded copy a pod: sk_lookup has no namespace cookie, so the loader's constant is replaced by the pod's.
 */
#include "mesh.h"

#define LOOPBACK_IFINDEX 1
#define COOKIE_PLACEHOLDER "0x50494c4c494f4e21"

int inbound(struct bpf_sk_lookup *ctx) {
  if (ctx->protocol != IPPROTO_TCP || ctx->ingress_ifindex == LOOPBACK_IFINDEX) return SK_PASS;
  u64 ns;
  asm volatile("%0 = " COOKIE_PLACEHOLDER " ll" : "=r"(ns));
  struct pod *pod = pods.lookup(&ns);
  if (!pod) return SK_DROP; /* attached but not registered: nobody may come in */
  struct addr from = {.family = (u16)ctx->family};
  if (ctx->family == AF_INET) {
    from.ip[0] = READ(ctx->remote_ip4);
  } else {
    from.ip[0] = READ(ctx->remote_ip6[0]);
    from.ip[1] = READ(ctx->remote_ip6[1]);
    from.ip[2] = READ(ctx->remote_ip6[2]);
    from.ip[3] = READ(ctx->remote_ip6[3]);
  }
  if (is_own(pod, &from)) return SK_PASS;
  if (!(pod->flags & POD_REFUSE) && in_port_set(ns, PORTS_SKIP_INBOUND, ctx->local_port)) return SK_PASS;
  struct listener_key key = {.ns = ns, .family = AF_INET6};
  struct bpf_sock *listener = 0;
  if (ctx->family == AF_INET6) listener = (struct bpf_sock *)listeners.lookup(&key);
  if (!listener) {
    key.family = AF_INET;
    listener = (struct bpf_sock *)listeners.lookup(&key);
  }
  if (!listener || pod->flags & POD_REFUSE) {
    if (listener) bpf_sk_release(listener);
    count(ns, COUNT_REFUSED_INBOUND, 1);
    return SK_DROP;
  }
  long failed = bpf_sk_assign((void *)ctx, (void *)listener, 0);
  bpf_sk_release(listener);
  count(ns, failed ? COUNT_REFUSED_INBOUND : COUNT_STEERED, 1);
  return failed ? SK_DROP : SK_PASS;
}
