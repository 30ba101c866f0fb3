/* tests/faults/serve_load.c: many clients at once, good and bad, against a running hybridserve.
 *
 *   serve_load PORT CLIENTS REQUESTS SEED
 *
 * Each client is a process that sends its share of the requests, streams most of them. Some leave
 * by FIN or RST before or in the middle of the answer, some send malformed requests, trickle, read
 * slowly or not at all. Whoever waits must get what the same request got before, alone, or a status
 * that says why not; a malformed request must get the status that it deserves. Prints how many
 * ended in which way; exit code 0 when none was wrong.
 */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

enum { N_PROMPTS = 12, MAX_ANSWER = 1 << 16 };

enum end {
    COMPLETE,      // whole and equal to the answer alone
    COMPLETE_SLOW, // the same, read in small pieces with pauses
    BUSY,          // 429 or 503
    MALFORMED,     // refused with the right status
    LEFT,          // by the client, before the answer began
    CANCELLED,     // by the client, in the middle of a stream
    TRICKLED,      // left after some bytes of a request
    UNREAD,        // left without reading
    WRONG,
    ENDS
};

static const char *const end_names[ENDS] = {
    "complete",       "complete, read slowly",   "busy (429, 503)",   "malformed and told so",
    "left at random", "cancelled in mid-answer", "trickled and left", "never read and left",
    "wrong"
};

static int port;
static char alone[N_PROMPTS][MAX_ANSWER]; // "text" of each prompt's answer
static uint64_t random_state;
static atomic_int *ended; // (ENDS), shared by all clients

static uint64_t draw(uint64_t n)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state % n;
}

static int connect_to(void)
{
    const struct timeval patience = { 120, 0 };
    const struct sockaddr_in a = { .sin_family = AF_INET,
                                   .sin_port = htons((uint16_t)port),
                                   .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    for (int k = 0; k < 100; k++) {
        const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (fd >= 0 && connect(fd, (const struct sockaddr *)&a, sizeof a) == 0) {
            setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
            return fd;
        }
        close(fd);
        usleep(20000);
    }
    return -1;
}

static bool put(int fd, const char *p, size_t n)
{
    while (n > 0) {
        const ssize_t k = send(fd, p, n, MSG_NOSIGNAL);
        if (k <= 0) return false;
        p += k;
        n -= (size_t)k;
    }
    return true;
}

static void send_request(int fd, int prompt, bool stream)
{
    char body[512], head[512];
    const int n = snprintf(
        body, sizeof body,
        "{\"prompt\":\"number %d of the %d\",\"temperature\":0,\"max_tokens\":%d,\"stream\":%s}",
        prompt, prompt * 7, 16 + 7 * prompt, stream ? "true" : "false");
    const int h = snprintf(head, sizeof head,
                           "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: "
                           "close\r\nContent-Length: %d\r\n\r\n",
                           n);
    put(fd, head, (size_t)h);
    put(fd, body, (size_t)n);
}

/* Appends what one recv gives, after a pause where the client is slow. */
static bool take(int fd, char *all, size_t *n, size_t room, bool slow)
{
    if (slow) usleep(2000);
    const ssize_t got = recv(fd, all + *n, slow && room > 200 ? 200 : room, 0);
    if (got <= 0) return false;
    *n += (size_t)got;
    all[*n] = '\0';
    return true;
}

/* Joins the "text" fields of an answer or a stream. False when it is not whole. */
static bool read_text(int fd, char *out, int *status, bool slow)
{
    char *all = calloc(1, 1 << 20);
    size_t n = 0, k = 0;
    if (!all) abort();
    while (take(fd, all, &n, (1 << 20) - 1 - n, slow)) {
    }
    *status = 0;
    sscanf(all, "HTTP/1.1 %d", status);
    for (char *p = all; (p = strstr(p, "\"text\":\""));) {
        for (p += 8; *p && *p != '"' && k + 2 < MAX_ANSWER; p++) {
            if (*p == '\\') out[k++] = *p++;
            out[k++] = *p;
        }
    }
    out[k] = '\0';
    const bool whole = strstr(all, "data: [DONE]") || strstr(all, "\"usage\":{");
    free(all);
    return whole;
}

static void hang_up(int fd)
{
    const struct linger hard = { 1, 0 };
    if (draw(2)) setsockopt(fd, SOL_SOCKET, SO_LINGER, &hard, sizeof hard); // RST instead of FIN
    close(fd);
}

struct malformed {
    const char *request; // whole, or a body for POST /v1/completions
    int status;          // 0: the server may just close
};

static const struct malformed malformed[] = {
    { "\x16\x03\x01\x02\x00\x01\r\n\r\n", 0 }, // TLS to a plain port
    { "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n", 0 },
    { "POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: "
      "4\r\nConnection: close\r\n\r\n4\r\nabcd\r\n0\r\n\r\n",
      0 },
    { "POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nConnection: "
      "close\r\n\r\nzz\r\n\r\n",
      0 },
    { "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: "
      "60\r\n\r\n{\"prompt\":\"cut",
      0 }, // and no more comes
    { "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: "
      "5\r\n\r\n{\"prompt\":\"a\",\"max_tokens\":2}",
      400 }, // its first five bytes
    { "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n{}", 0 },
    { "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: ten\r\n\r\n{}", 0 },
    { "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n{\"prompt\":1}", 0 },
    { "DELETE /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 0 },
    { "GET /no/such/page HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 404 },
    { "{\"prompt\":", 400 },
    { "[]", 400 },
    { "{}", 400 },
    { "{\"prompt\":{}}", 400 },
    { "{\"prompt\":\"a\",\"max_tokens\":-1}", 400 },
    { "{\"prompt\":\"a\",\"max_tokens\":1.5}", 400 },
    { "{\"prompt\":\"a\",\"temperature\":\"hot\"}", 400 },
    { "{\"prompt\":\"a\",\"n\":1000000}", 400 },
    { "{\"prompt\":[99999999]}", 400 },
    { "{\"prompt\":\"\xff\xfe\"}", 400 },
    { "{\"prompt\":\"a\",\"logit_bias\":{\"x\":1}}", 400 },
    { "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[", 400 },
};

/* A body beyond what the server takes (256 KiB here), its length told or not: 413, or the end. */
static enum end send_huge(int fd)
{
    static char spaces[1 << 16];
    char head[256], text[MAX_ANSWER];
    const size_t n_bytes = 1 << 20;
    const bool chunked = draw(2);
    int status;

    memset(spaces, ' ', sizeof spaces);
    put(fd, head,
        (size_t)snprintf(
            head, sizeof head, "POST /v1/completions HTTP/1.1\r\nHost: x\r\n%s%zu\r\n\r\n",
            chunked ? "Transfer-Encoding: chunked\r\nX-Length: " : "Content-Length: ", n_bytes));
    for (size_t i = 0; i < n_bytes / sizeof spaces; i++) {
        if (chunked && !put(fd, "10000\r\n", 7)) break;
        if (!put(fd, spaces, sizeof spaces)) break;
        if (chunked && !put(fd, "\r\n", 2)) break;
    }
    shutdown(fd, SHUT_WR);
    read_text(fd, text, &status, false);
    if (status == 0 || status == 400 || status == 413) return MALFORMED;
    fprintf(stderr, "status %d for a body of %zu bytes\n", status, n_bytes);
    return WRONG;
}

static enum end send_malformed(int fd)
{
    const size_t n = sizeof malformed / sizeof *malformed, which = draw(n + 1);
    if (which == n) return send_huge(fd);
    const struct malformed *m = &malformed[which];
    char head[256], text[MAX_ANSWER];
    int status;

    if (m->request[0] == '{' || m->request[0] == '[') {
        const int h = snprintf(head, sizeof head,
                               "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: "
                               "close\r\nContent-Length: %zu\r\n\r\n",
                               strlen(m->request));
        put(fd, head, (size_t)h);
    }
    put(fd, m->request, strlen(m->request));
    if (m->status == 0) shutdown(fd, SHUT_WR); // what comes after a broken frame is not for us
    read_text(fd, text, &status, false);
    if (m->status == 0 ? status == 0 || (status >= 400 && status < 600) : status == m->status)
        return MALFORMED;
    fprintf(stderr, "status %d instead of %d for '%s'\n", status, m->status, m->request);
    return WRONG;
}

/* Waits for the whole answer. */
static enum end ask(int fd, int prompt, bool stream, bool slow)
{
    const int little = 4096;
    char text[MAX_ANSWER];
    int status;

    if (slow) setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &little, sizeof little);
    send_request(fd, prompt, stream);
    const bool whole = read_text(fd, text, &status, slow);
    if (status == 429 || status == 503) return BUSY;
    if (whole && status == 200 && strcmp(text, alone[prompt]) == 0)
        return slow ? COMPLETE_SLOW : COMPLETE;
    fprintf(stderr, "prompt %d: status %d, %s: '%s' instead of '%s'\n", prompt, status,
            whole ? "whole" : "cut", text, alone[prompt]);
    return WRONG;
}

/* Reads the beginning of a stream only. */
static enum end ask_and_cancel(int fd, int prompt)
{
    char some[300] = "";
    size_t n = 0;

    send_request(fd, prompt, true);
    take(fd, some, &n, sizeof some - 1, false);
    return strncmp(some, "HTTP/1.1 429", 12) == 0 || strncmp(some, "HTTP/1.1 503", 12) == 0
               ? BUSY
               : CANCELLED;
}

static enum end leave(int fd, int prompt, bool trickles)
{
    if (!trickles) {
        send_request(fd, prompt, draw(2));
        usleep((useconds_t)draw(200000));
        return LEFT;
    }
    for (int k = 0; k < 10; k++) {
        put(fd, "P", 1);
        usleep(10000);
    }
    return TRICKLED;
}

static enum end one_request(int fd, int prompt, uint64_t kind)
{
    if (kind < 4) return leave(fd, prompt, false);
    if (kind < 7) return ask_and_cancel(fd, prompt);
    if (kind < 9) return send_malformed(fd);
    if (kind == 9) return leave(fd, prompt, true);
    if (kind == 10) {
        send_request(fd, prompt, true);
        usleep(300000);
        return UNREAD;
    }
    return ask(fd, prompt, kind % 4 != 0, kind == 11);
}

static void client(int requests)
{
    for (int i = 0; i < requests; i++) {
        const int prompt = (int)draw(N_PROMPTS), fd = connect_to();
        if (fd < 0) {
            fprintf(stderr, "no connection\n");
            atomic_fetch_add(&ended[WRONG], 1);
            continue;
        }
        const enum end end = one_request(fd, prompt, draw(24));
        if (end == COMPLETE || end == COMPLETE_SLOW || end == MALFORMED)
            close(fd);
        else
            hang_up(fd);
        atomic_fetch_add(&ended[end], 1);
    }
}

int main(int argc, char **argv)
{
    if (argc != 5) return fprintf(stderr, "usage: serve_load PORT CLIENTS REQUESTS SEED\n"), 2;
    port = atoi(argv[1]);
    const int clients = atoi(argv[2]), requests = atoi(argv[3]);
    const uint64_t seed = strtoull(argv[4], NULL, 10);
    int failed = 0, status, sum = 0;

    ended =
        mmap(NULL, ENDS * sizeof *ended, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (ended == MAP_FAILED) return perror("mmap"), 1;
    for (int i = 0; i < N_PROMPTS; i++) {
        const int fd = connect_to();
        if (fd < 0) return fprintf(stderr, "nobody listens on port %d\n", port), 1;
        send_request(fd, i, false);
        if (!read_text(fd, alone[i], &status, false))
            return fprintf(stderr, "prompt %d alone: status %d\n", i, status), 1;
        close(fd);
    }
    for (int c = 0; c < clients; c++) {
        const int share = requests / clients + (c < requests % clients);
        const pid_t pid = fork();
        if (pid < 0) return perror("fork"), 1;
        if (pid > 0) continue;
        random_state = (seed * 1000003 + (uint64_t)c + 1) * 0x9E3779B97F4A7C15u;
        client(share);
        _exit(0);
    }
    for (int c = 0; c < clients; c++)
        if (wait(&status) < 0 || !WIFEXITED(status) || WEXITSTATUS(status) != 0) failed++;
    for (int k = 0; k < ENDS; k++) {
        printf("%6d %s\n", atomic_load(&ended[k]), end_names[k]);
        sum += atomic_load(&ended[k]);
    }
    if (sum != requests) fprintf(stderr, "%d of %d requests ended\n", sum, requests);
    if (failed) fprintf(stderr, "%d of %d clients died\n", failed, clients);
    if (atomic_load(&ended[WRONG]))
        fprintf(stderr, "wrong answers (seed %llu)\n", (unsigned long long)seed);
    return failed > 0 || sum != requests || atomic_load(&ended[WRONG]) > 0;
}
