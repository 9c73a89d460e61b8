/* A connection arrives: it goes to the sidecar's listener, whatever port it is for; the app's own listeners are not asked.
 *
 * Stops: reaching the app around its sidecar. Loopback passes (the sidecar's own hop, and an app that calls itself). Without a listener
 * the caller gets a reset. One loaded copy a pod: sk_lookup has no namespace cookie, so the loader's constant is replaced by the pod's.
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
