/* The hop between app and sidecar, with a sidecar that does nothing but relay: what capture itself costs, in C, so that nothing hides it.
 *
 *   hop server PORT               echoes messages, or swallows bytes and answers with their number
 *   hop relay PORT IP PORT        recv() and send() between each connection it accepts and one of its own, told by epoll as sidecars are
 *   hop latency IP PORT SIZE N    prints the median and the 99th percentile of N round trips in microseconds
 *   hop busy IP PORT SIZE N CONNECTIONS  the same with a message under way on each connection all the time, and a server of many
 *   hop bulk IP PORT BYTES CHUNK  prints the bytes per second until the server has counted them all, which waits for them by poll(2)
 *   hop blocking IP PORT BYTES CHUNK  the same with a server that waits inside recv(2)
 *
 * A connection's first 8 bytes say what its client wants: u32 1 (alone) or 4 (one of many) and the size of its messages, or u32 2 (poll)
 * or 3 (recv) and 0. Exit code 1 and errno's text when anything goes wrong, a wrong count included. Built and run by bench.hop.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { ECHO = 1, SWALLOW = 2, SWALLOW_BLOCKING = 3, ECHO_MANY = 4 };
enum { BUFFER = 1 << 20, READ = 256 << 10, WARM_UP = 200, FDS = 1024, EVENTS = 64 };

static char buffer[BUFFER];

static void fail(const char *what) {
  perror(what);
  exit(1);
}

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void no_delay(int fd) {
  int on = 1;
  if (setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on)) fail("TCP_NODELAY");
}

static int listen_on(const char *port) {
  int fd = socket(AF_INET, SOCK_STREAM, 0), on = 1;
  struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(port))};
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  if (bind(fd, (struct sockaddr *)&at, sizeof at) || listen(fd, 64)) fail("listen");
  puts("listening");
  fflush(stdout);
  return fd;
}

static int connect_to(const char *ip, const char *port) {
  int fd = socket(AF_INET, SOCK_STREAM, 0);
  struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(port))};
  inet_pton(AF_INET, ip, &to.sin_addr);
  if (connect(fd, (struct sockaddr *)&to, sizeof to)) fail("connect");
  no_delay(fd);
  return fd;
}

/* With flags 0 too: a blocking recv() of a socket in a sockmap may say EAGAIN once after the other end shut down. */
static ssize_t receive_with(int fd, void *to, size_t size, int flags) {
  for (;;) {
    ssize_t n = recv(fd, to, size, flags);
    if (n >= 0) return n;
    if (errno != EAGAIN && errno != EINTR) return -1;
    struct pollfd wait = {.fd = fd, .events = POLLIN};
    poll(&wait, 1, -1);
  }
}

static ssize_t receive(int fd, void *to, size_t size) {
  return receive_with(fd, to, size, 0);
}

static int receive_all(int fd, void *to, size_t size) {
  for (size_t done = 0; done < size;) {
    ssize_t n = receive(fd, (char *)to + done, size - done);
    if (n <= 0) return -1;
    done += (size_t)n;
  }
  return 0;
}

static void send_all(int fd, const void *from, size_t size) {
  for (size_t done = 0; done < size;) {
    ssize_t n = send(fd, (const char *)from + done, size - done, MSG_NOSIGNAL);
    if (n < 0 && errno != EINTR && errno != EAGAIN) fail("send");
    if (n > 0) done += (size_t)n;
  }
}

static void watch(int epoll, int fd) {
  struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
  if (fd >= FDS) errno = EMFILE;
  if (fd >= FDS || epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event)) fail("epoll_ctl");
}

static int new_epoll(void) {
  int epoll = epoll_create1(0);
  if (epoll < 0) fail("epoll_create1");
  return epoll;
}

/* Until the last of many connections ends; the wish of the first one is read. */
static void serve_many(int listener, int fd, uint32_t size) {
  struct epoll_event event[EVENTS];
  int epoll = new_epoll(), connections = 1;
  watch(epoll, listener);
  watch(epoll, fd);
  while (connections) {
    int count = epoll_wait(epoll, event, EVENTS, -1);
    for (int i = 0; i < count; i++) {
      uint32_t wish[2];
      int from = event[i].data.fd;
      if (from != listener) {
        if (!receive_all(from, buffer, size)) {
          send_all(from, buffer, size);
        } else {
          close(from);
          connections--;
        }
      } else if ((from = accept(listener, 0, 0)) >= 0) {
        no_delay(from);
        if (receive_all(from, wish, sizeof wish)) fail("a connection that wants nothing");
        watch(epoll, from);
        connections++;
      }
    }
  }
  close(epoll);
}

/* Closes the connection. */
static void serve(int listener, int fd) {
  uint32_t wish[2];
  uint64_t count = 0;
  if (receive_all(fd, wish, sizeof wish)) {
    close(fd);
    return;
  }
  if (wish[0] == ECHO_MANY) {
    serve_many(listener, fd, wish[1]);
    return;
  }
  if (wish[0] == ECHO) {
    while (!receive_all(fd, buffer, wish[1])) send_all(fd, buffer, wish[1]);
  } else {
    int flags = wish[0] == SWALLOW ? MSG_DONTWAIT : 0;
    for (ssize_t n; (n = receive_with(fd, buffer, READ, flags)) > 0;) count += (uint64_t)n;
    send_all(fd, &count, sizeof count);
  }
  close(fd);
}

/* Both connections of a relayed one, by their descriptors. */
static struct {
  int other;
  int ended;
} leg[FDS];

/* What a connection says goes to the other one, its end too. */
static void relay_from(int fd, int epoll) {
  int other = leg[fd].other;
  ssize_t n = recv(fd, buffer, READ, MSG_DONTWAIT);
  if (n > 0) send_all(other, buffer, (size_t)n);
  if (n > 0 || (n < 0 && (errno == EAGAIN || errno == EINTR))) return;
  shutdown(other, SHUT_WR);
  epoll_ctl(epoll, EPOLL_CTL_DEL, fd, 0);
  leg[fd].ended = 1;
  if (leg[other].ended) {
    close(other);
    close(fd);
  }
}

static void relay(int listener, const char *ip, const char *port) {
  struct epoll_event event[EVENTS];
  int epoll = new_epoll();
  watch(epoll, listener);
  for (;;) {
    int count = epoll_wait(epoll, event, EVENTS, -1);
    for (int i = 0; i < count; i++) {
      int from = event[i].data.fd;
      if (from != listener) {
        if (!leg[from].ended) relay_from(from, epoll);
      } else if ((from = accept(listener, 0, 0)) >= 0) {
        no_delay(from);
        int to = connect_to(ip, port), pair[] = {from, to};
        for (int end = 0; end < 2; end++) {
          watch(epoll, pair[end]);
          leg[pair[end]].other = pair[1 - end];
          leg[pair[end]].ended = 0;
        }
      }
    }
  }
}

static int ascending(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static void print_times(double *took, int count) {
  qsort(took, (size_t)count, sizeof *took, ascending);
  printf("%.2f %.2f\n", took[count / 2], took[count - 1 - count / 100]);
}

static void latency(int fd, uint32_t size, int count) {
  uint32_t wish[2] = {ECHO, size};
  double *took = calloc((size_t)count, sizeof *took);
  send_all(fd, wish, sizeof wish);
  for (int i = -WARM_UP; i < count; i++) {
    double began = now();
    send_all(fd, buffer, size);
    if (receive_all(fd, buffer, size)) fail("the echo ended");
    if (i >= 0) took[i] = (now() - began) * 1e6;
  }
  print_times(took, count);
}

/* Each connection sends its next message as soon as the one before is back. In the end every message is. */
static void busy(const char *ip, const char *port, uint32_t size, int count, int connections) {
  static double began[FDS];
  uint32_t wish[2] = {ECHO_MANY, size};
  struct epoll_event event[EVENTS];
  double *took = calloc((size_t)count, sizeof *took);
  int epoll = new_epoll(), done = -WARM_UP, to_send = WARM_UP + count - connections;
  for (int i = 0; i < connections; i++) {
    int fd = connect_to(ip, port);
    watch(epoll, fd);
    send_all(fd, wish, sizeof wish);
    began[fd] = now();
    send_all(fd, buffer, size);
  }
  while (done < count) {
    int ready = epoll_wait(epoll, event, EVENTS, -1);
    for (int i = 0; i < ready; i++, done++) {
      int fd = event[i].data.fd;
      if (receive_all(fd, buffer, size)) fail("the echo ended");
      double ended = now();
      if (done >= 0) took[done] = (ended - began[fd]) * 1e6;
      began[fd] = ended;
      if (to_send-- > 0) send_all(fd, buffer, size);
    }
  }
  print_times(took, count);
}

static void bulk(int fd, uint32_t how, uint64_t size, uint64_t chunk) {
  uint32_t wish[2] = {how, 0};
  uint64_t counted = 0;
  send_all(fd, wish, sizeof wish);
  double began = now();
  for (uint64_t done = 0; done < size; done += chunk) send_all(fd, buffer, chunk);
  shutdown(fd, SHUT_WR);
  if (receive_all(fd, &counted, sizeof counted)) fail("no count came back");
  if (counted != (size + chunk - 1) / chunk * chunk) {
    fprintf(stderr, "%llu bytes arrived, not %llu\n", (unsigned long long)counted, (unsigned long long)size);
    exit(1);
  }
  printf("%.0f\n", (double)counted / (now() - began));
}

int main(int words, char **word) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  signal(SIGPIPE, SIG_IGN);
  const char *role = words > 1 ? word[1] : "";
  int serving = !strcmp(role, "server") && words == 3, relaying = !strcmp(role, "relay") && words == 5;
  if (serving || relaying) {
    int listener = listen_on(word[2]);
    if (relaying) relay(listener, word[3], word[4]);
    for (;;) {
      int fd = accept(listener, 0, 0);
      if (fd < 0) continue;
      no_delay(fd);
      serve(listener, fd);
    }
  }
  if (!strcmp(role, "latency") && words == 6) latency(connect_to(word[2], word[3]), (uint32_t)atoi(word[4]), atoi(word[5]));
  else if (!strcmp(role, "busy") && words == 7) busy(word[2], word[3], (uint32_t)atoi(word[4]), atoi(word[5]), atoi(word[6]));
  else if (!strcmp(role, "bulk") && words == 6) bulk(connect_to(word[2], word[3]), SWALLOW, strtoull(word[4], 0, 10), strtoull(word[5], 0, 10));
  else if (!strcmp(role, "blocking") && words == 6)
    bulk(connect_to(word[2], word[3]), SWALLOW_BLOCKING, strtoull(word[4], 0, 10), strtoull(word[5], 0, 10));
  else return 2;
  return 0;
}
