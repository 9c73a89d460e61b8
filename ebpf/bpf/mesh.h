/* What every program shares: the state of a connection, the maps, and why acceleration is safe.
 *
 * THEORY OF OPERATION
 *
 * A pod is a network namespace, known by its cookie (bpf_get_netns_cookie; never reused while the kernel runs). Everything here is keyed
 * by it: two pods may hold the same loopback 4-tuple at the same moment, and a key without the cookie hands one pod's bytes to the other.
 *
 * Capture. connect() is decided once, in process context, where uid and namespace are exact. The address is replaced before the kernel
 * routes: no packet is translated, no conntrack entry made. Inbound, sk_lookup hands the connection to the sidecar's listener.
 *   - The sidecar is away: connect() meets a closed port (ECONNREFUSED), sk_lookup answers SK_DROP (RST). Never around it.
 *   - No memory for the state of a connection: connect() is refused, because a captured connection without its target is useless.
 *   - MPTCP never calls connect hooks: such sockets cannot be made here (sockets.bpf.c), and runtimes fall back to TCP.
 *   - Loopback and the pod's own addresses are left alone, as nftables' `oifname lo return` does.
 *
 * Pairing. Which two sockets of this namespace are the ends of one connection? Addresses do not say it when something translated them.
 * Sequence numbers do: the client's (snd_una, rcv_nxt) at ACTIVE_ESTABLISHED equal the server's (rcv_nxt, snd_nxt) at PASSIVE_ESTABLISHED,
 * and ACTIVE comes first. Only connections that connect() marked publish a pair, and a pair is taken once. A stranger who wants to take
 * one needs both 32-bit numbers of a handshake that it does not see, and the client's port, within the microseconds until it is taken.
 *
 * Acceleration (redirect.bpf.c). A message goes straight to the peer's queue when, and only when, all hold at that moment:
 *   order:   peer->copied_seq == me->write_seq. The peer's application has read every byte of ours that travelled by TCP. Bytes in the
 *            queue are read before bytes in TCP's receive queue, so redirecting earlier would overtake: data in the SYN (TCP Fast Open),
 *            the data that made a TCP_DEFER_ACCEPT socket, or any message that fell back a moment ago. Leaving is always safe for the same
 *            reason. Therefore also the first message is checked.
 *   reader:  after bytes went by TCP, the peer's application must not be inside TCP's recv(2), which never looks into the queue: with
 *            MSG_WAITALL it would have read all of ours and sleep there for ever. Inside it owns the socket, or sleeps on it with the wake
 *            function of blocked readers; once outside, it comes back to TCP only for bytes that are not there. Read in this order: bytes,
 *            owner, sleepers. Polling is not sleeping in recv(2). Checked once after each fall back (`settled`), except towards the sidecar,
 *            which never waits for all.
 *   memory:  the peer's unread bytes are at most QUEUE_LIMIT. The kernel itself bounds nothing here: a reader that reads nothing lets its
 *            writer put gigabytes into kernel memory. Past the limit the message goes by TCP, whose window stops the writer.
 *   short:   TCP's send buffer is kept small (TCP_BUFFER). The order rule lets a writer back to the short way when its reader has drained
 *            TCP, and one that is faster than its reader never lets 4 MB of send buffer drain: one message past the limit, and all that
 *            follow go by TCP. With a small one the writer is stopped, and started again by a reader that is nearly through. Not the receive
 *            buffer: with room for one or two segments of loopback (64 KB each) some are dropped, and come again after up to 200 ms.
 *   one:     what an app reads comes all by the queue or all by TCP. An app that waits for edges may take a short read, or what FIONREAD
 *            says, for the end of what is there; FIONREAD tells of one of the two alone, and bytes in the other would wait for an edge that
 *            has passed. The sidecar reads until there is nothing, so this is kept towards the app only, in three places:
 *     pace:    nothing follows the queue by TCP. The sidecar asks how much is unread (sockopt.bpf.c) and stays below QUEUE_LIMIT by itself
 *              (proxy/transport/pace.py); the limit is for relays that do not ask.
 *     front:   nothing goes before it. When the sidecar wrote before the app's socket was made (TCP_DEFER_ACCEPT, a full backlog, data in
 *              a SYN), the socket stays out of the map, and the connection on TCP (sockops.bpf.c).
 *     one way: a kernel whose FIONREAD tells of TCP's bytes also for sockets in the map (6.1) gets acceleration of what the app sends
 *              alone (POD_ONE_WAY). Which FIONREAD a kernel has is tried at every load (ebpf/probe.py).
 * Everything else goes by TCP: an unknown peer, a peer that closed (its map entry is gone with it), a failed read. The peer's counters are
 * read through an address remembered at pairing; that socket may be freed since, so it is only ever probed, and a stranger's numbers can
 * merely choose wrongly between two correct paths' eligibility: delivery goes through the map, by a key that no other socket has.
 *
 * FULL MAPS
 *   pods, counters, port_sets, listeners   written by the agent only, which gets E2BIG and does not register the pod.
 *   pairs   least recently used out. Lost before the accepting end took it: the sidecar does not learn the target and refuses the
 *           connection (fail closed). Lost after: the connection stays on TCP (fail open). Entries live for microseconds, or until the
 *           connecting end's first message.
 *   socks   the connection is not accelerated, and counted (full). Entries go with their sockets.
 *   flows   socket storage, as many as sockets; charged to who makes the socket.
 */
#ifndef PILLION_MESH_H
#define PILLION_MESH_H

#ifndef PODS_MAX
#define PODS_MAX 1024
#endif
#ifndef PAIRS_MAX
#define PAIRS_MAX 16384
#endif
#ifndef SOCKS_MAX
#define SOCKS_MAX 65536
#endif
#ifndef QUEUE_LIMIT
#define QUEUE_LIMIT (2 << 20)
#endif
#ifndef TCP_BUFFER
#define TCP_BUFFER (64 << 10) /* the kernel doubles it, for its own accounting */
#endif

#define AF_INET 2
#define AF_INET6 10
#define IPPROTO_TCP 6
#define V4_MAPPED bpf_htonl(0xffff)
#define V4_LOOPBACK bpf_htonl(0x7f000001)
#define V6_LOOPBACK_END bpf_htonl(1)
#define ALLOW 1
#define REFUSE 0

/* Stops clang from merging loads of context fields across branches, which the verifier refuses ("dereference of modified ctx ptr"). */
#define READ(x) ({ u32 _v = (x); asm volatile("" : "+r"(_v)); _v; })
/* Keeps two neighbouring context stores apart: merged into one of 8 bytes they are refused. */
#define APART() asm volatile("" ::: "memory")

/* An address: everything in network order but the family. Also the value of the caller option (core/capture.py). IPv4 in ip[0]. */
struct addr {
  u16 family;
  u16 port;
  u32 ip[4];
};

/* What the agent says about a pod. */
struct pod {
  u32 uid;      /* the sidecar's, as the initial user namespace counts */
  u32 flags;    /* POD_* */
  u32 out_port; /* host order: where the sidecar takes what the app calls */
  u32 in_port;  /* host order: informational, the listener is in `listeners` */
  u32 own4[4];  /* the pod's own addresses, which are not captured; unused ones repeat loopback */
  u32 own6[4][4];
};
#define POD_CAPTURE 1       /* connect() leads to the sidecar */
#define POD_ACCELERATE 2    /* hops between app and sidecar skip TCP */
#define POD_TRANSLATED 4    /* nftables captures here: pair what connects anywhere, rewrite nothing */
#define POD_CALLER 8        /* the sidecar may say who calls */
#define POD_RESUME 16       /* towards the app too, do not look for a sleeping reader: faster bulk, hangs one in MSG_WAITALL */
#define POD_REFUSE 32       /* no level of capture works here: nothing leaves, nothing comes in */
#define POD_ONE_WAY 64      /* what the app reads goes by TCP: this kernel's FIONREAD would not tell it of anything else */

struct isns {
  u64 ns;
  u32 client;
  u32 server;
};
/* One end of a connection: the key of its socket. side 0 connected, side 1 accepted. */
struct end {
  struct isns isns;
  u32 side;
  u32 zero;
};

/* Published at ACTIVE_ESTABLISHED, taken at PASSIVE_ESTABLISHED. */
struct pair {
  struct addr dialled;
  struct addr caller;
  u64 sockets[2]; /* struct tcp_sock of both ends, for probing only */
  u32 flags;      /* FLOW_* of the connecting end */
  u32 client_port;
};

/* What a socket of ours carries with it (socket storage). */
struct flow {
  struct addr dialled; /* the target the app asked for: SO_ORIGINAL_DST of the accepting end */
  struct addr shown;   /* what getpeername() and accept() say; family 0: nothing to change */
  struct end peer;
  u64 peer_socket;
  u32 flags;           /* FLOW_* */
  u32 settled;         /* write_seq up to which no reader can be waiting inside TCP for more */
};
/* May what this socket sends go the short way? */
#define SHORTENED(flags) ((flags) & FLOW_ACCELERATE && ((flags) & (FLOW_TO_APP | FLOW_ONE_WAY)) != (FLOW_TO_APP | FLOW_ONE_WAY))
#define FLOW_CAPTURED 1
#define FLOW_ACCELERATE 2
#define FLOW_ACCEPTED 4
#define FLOW_TO_APP 8   /* what this socket sends is read by the app */
#define FLOW_PAIRED 16  /* the pair is taken */
#define FLOW_RESUME 32       /* the reader never waits for all */
#define FLOW_BACK_RESUME 64  /* the same for what the accepting end sends */
#define FLOW_ONE_WAY 128     /* of both ends: what the app reads goes by TCP */

struct port_set_key {
  u64 ns;
  u32 kind; /* PORTS_* */
  u32 zero;
};
struct port_set {
  u64 bits[1024];
};
#define PORTS_SKIP_OUTBOUND 0
#define PORTS_SKIP_INBOUND 1
#define PORTS_NOT_ACCELERATED 2

struct listener_key {
  u64 ns;
  u32 family; /* AF_INET: also takes IPv6 when it is dual-stack; AF_INET6: a listener for IPv6 alone */
  u32 zero;
};

enum counter {
  COUNT_CAPTURED,
  COUNT_PAIRED,
  COUNT_ACCELERATED,
  COUNT_MESSAGES,
  COUNT_BYTES,
  COUNT_BY_TCP_ORDER,
  COUNT_BY_TCP_MEMORY,
  COUNT_BY_TCP_UNPAIRED,
  COUNT_BY_TCP_FULL,
  COUNT_STEERED,
  COUNT_REFUSED_INBOUND,
  COUNT_REFUSED_OUTBOUND,
  COUNT_CALLERS,
  COUNT_REFUSED_CALLERS,
  COUNT_REFUSED_SOCKETS,
  COUNT_ORIGINAL_DST,
  COUNTERS
};
struct counters {
  u64 of[COUNTERS];
};

/* BPF_SOCKHASH of bcc has no lookup. */
struct listeners_table_t {
  struct listener_key key;
  u64 leaf;
  u64 *(*lookup)(struct listener_key *);
  u32 max_entries;
  int flags;
};

BPF_HASH(pods, u64, struct pod, PODS_MAX);
BPF_F_TABLE("percpu_hash", u64, struct counters, counters, PODS_MAX, 1 /* BPF_F_NO_PREALLOC */);
BPF_F_TABLE("hash", struct port_set_key, struct port_set, port_sets, 3 * PODS_MAX, 1 /* BPF_F_NO_PREALLOC */);
BPF_TABLE("lru_hash", struct isns, struct pair, pairs, PAIRS_MAX);
BPF_SK_STORAGE(flows, struct flow);
BPF_SOCKHASH(socks, struct end, SOCKS_MAX);
__attribute__((section("maps/sockhash"))) struct listeners_table_t listeners = {.max_entries = 2 * PODS_MAX, .flags = 0};

static int (*const set_errno)(int error) = (void *)187; /* bpf_set_retval, 5.18 */
#define ECONNREFUSED 111
#define EPROTONOSUPPORT 93

static __always_inline void count(u64 ns, enum counter what, u64 by) {
  struct counters *c = counters.lookup(&ns);
  if (c && what < COUNTERS) __sync_fetch_and_add(&c->of[what], by);
}

/* port: host order. */
static __always_inline int in_port_set(u64 ns, u32 kind, u32 port) {
  struct port_set_key key = {.ns = ns, .kind = kind};
  struct port_set *set = port_sets.lookup(&key);
  return set && (set->bits[(port >> 6) & 1023] >> (port & 63)) & 1;
}

/* Where nobody is (core/capture.py), at the sidecar's own port: led to the sidecar whoever dials, so that the sidecar can see capture work. */
static __always_inline int is_proof(struct pod *pod, struct addr *to, u32 port) {
  if (port != pod->out_port) return 0;
  if (to->family == AF_INET) return to->ip[0] == bpf_htonl(0xc0000201);
  return to->ip[0] == bpf_htonl(0x01000000) && !to->ip[1] && !to->ip[2] && to->ip[3] == bpf_htonl(1);
}

/* Loopback, the unspecified address (which connects to loopback), or one of the pod's own. */
static __always_inline int is_own(struct pod *pod, struct addr *a) {
  if (a->family == AF_INET) {
    if (!a->ip[0] || (a->ip[0] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000)) return 1;
    for (int i = 0; i < 4; i++)
      if (a->ip[0] == pod->own4[i]) return 1;
    return 0;
  }
  if (!a->ip[0] && !a->ip[1] && !a->ip[2] && (!a->ip[3] || a->ip[3] == V6_LOOPBACK_END)) return 1;
  for (int i = 0; i < 4; i++)
    if (a->ip[0] == pod->own6[i][0] && a->ip[1] == pod->own6[i][1] && a->ip[2] == pod->own6[i][2] && a->ip[3] == pod->own6[i][3]) return 1;
  return 0;
}

#endif
