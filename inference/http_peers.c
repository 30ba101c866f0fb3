/* inference/http_peers.c: which of our sockets are open, and for how long.
 *
 * evhttp tells neither when a connection opens nor when it ends, so the kernel is asked ten times a
 * second: every descriptor that is a socket on our port is a connection, and its SO_COOKIE says
 * whether it is still the one seen before. A connection is ended with shutdown(): evhttp then sees
 * the end of the stream and cleans up itself.
 */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>

#include "inference/http_impl.h"

struct peer {
    uint64_t cookie;           // 0: none here
    unsigned char address[16]; // of the client
    double since;              // connected, or answered last
    bool busy, answered, shut;
};

struct ht_peers {
    struct ht_peers_limits limits;
    struct peer *peers; // by descriptor
    int n;
};

struct ht_peers *ht_peers_create(const struct ht_peers_limits *limits)
{
    struct ht_peers *p = calloc(1, sizeof *p);
    struct rlimit files;
    if (!p) return NULL;
    p->limits = *limits;
    // the lowest free descriptor is taken for each connection, so they stay small
    p->n = 2 * limits->max_connections + 1024;
    if (getrlimit(RLIMIT_NOFILE, &files) == 0 && files.rlim_cur < (rlim_t)p->n)
        p->n = (int)files.rlim_cur;
    p->peers = calloc((size_t)p->n, sizeof *p->peers);
    if (p->peers) return p;
    free(p);
    return NULL;
}

void ht_peers_free(struct ht_peers *p)
{
    if (!p) return;
    free(p->peers);
    free(p);
}

static bool address_bytes(const struct sockaddr_storage *a, unsigned char out[16], int *port)
{
    memset(out, 0, 16);
    if (a->ss_family == AF_INET) {
        memcpy(out, &((const struct sockaddr_in *)a)->sin_addr, 4);
        *port = ntohs(((const struct sockaddr_in *)a)->sin_port);
    } else if (a->ss_family == AF_INET6) {
        memcpy(out, &((const struct sockaddr_in6 *)a)->sin6_addr, 16);
        *port = ntohs(((const struct sockaddr_in6 *)a)->sin6_port);
    } else {
        return false;
    }
    return true;
}

/* Bring the entry of fd up to date; false when it is no connection of ours. */
static bool look(struct ht_peers *p, int fd, double now)
{
    struct peer *x = &p->peers[fd];
    struct sockaddr_storage a;
    socklen_t n = sizeof(uint64_t);
    uint64_t cookie;
    int port = 0;

    if (getsockopt(fd, SOL_SOCKET, SO_COOKIE, &cookie, &n) != 0) {
        x->cookie = 0;
        return false;
    }
    if (x->cookie == cookie) return true;
    *x = (struct peer){ .since = now };
    n = sizeof a;
    if (getsockname(fd, (struct sockaddr *)&a, &n) != 0 || !address_bytes(&a, x->address, &port) ||
        port != p->limits.port)
        return false;
    n = sizeof a;
    if (getpeername(fd, (struct sockaddr *)&a, &n) != 0)
        return false; // the listening socket, or already gone
    if (!address_bytes(&a, x->address, &port)) return false;
    x->cookie = cookie;
    return true;
}

void ht_peers_busy(struct ht_peers *p, int fd, double now)
{
    if (fd < 0 || fd >= p->n || !look(p, fd, now)) return;
    p->peers[fd].busy = true;
}

void ht_peers_idle(struct ht_peers *p, int fd, double now)
{
    if (fd < 0 || fd >= p->n || !p->peers[fd].cookie) return;
    p->peers[fd].busy = false;
    p->peers[fd].answered = true;
    p->peers[fd].since = now;
}

static int same_client(const struct ht_peers *p, int fd)
{
    int n = 0;
    for (int i = 0; i < p->n; i++)
        n += p->peers[i].cookie != 0 && memcmp(p->peers[i].address, p->peers[fd].address, 16) == 0;
    return n;
}

int ht_peers_sweep(struct ht_peers *p, double now, int *n_busy, int64_t *n_over, int64_t *n_slow)
{
    int open = 0;
    *n_busy = 0;
    for (int fd = 3; fd < p->n; fd++) {
        struct peer *x = &p->peers[fd];
        const uint64_t before = x->cookie;
        if (!look(p, fd, now)) continue;
        const bool fresh = x->cookie != before;
        const bool over = fresh && (open >= p->limits.max_connections ||
                                    (p->limits.max_per_client < p->limits.max_connections &&
                                     same_client(p, fd) > p->limits.max_per_client));
        const bool slow =
            !x->busy && now - x->since > (x->answered ? p->limits.idle_s : p->limits.request_s);
        open++;
        *n_busy += x->busy;
        if (x->shut || (!over && !slow)) continue;
        *(over ? n_over : n_slow) += over || !x->answered;
        x->shut = true;
        shutdown(fd, SHUT_RDWR);
    }
    return open;
}
