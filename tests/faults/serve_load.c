/* tests/faults/serve_load.c: many clients at once, good and bad, against a running hybridserve.
 *
 *   serve_load PORT CLIENTS REQUESTS SEED
 *
 * Each client is a process that sends its share of the requests. A third are left by FIN or RST at
 * a random moment, some send rubbish, trickle or never read; the others must get the answer that
 * the same request got before, alone. Exit code 0 when all of them did.
 */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

enum { N_PROMPTS = 12, MAX_ANSWER = 1 << 16 };

static int port;
static char alone[N_PROMPTS][MAX_ANSWER]; // "text" of each prompt's answer
static uint64_t random_state;

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
        prompt, prompt * 7, 8 + 3 * prompt, stream ? "true" : "false");
    const int h = snprintf(head, sizeof head,
                           "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: "
                           "close\r\nContent-Length: %d\r\n\r\n",
                           n);
    put(fd, head, (size_t)h);
    put(fd, body, (size_t)n);
}

/* Joins the "text" fields of an answer or a stream. False when it is not whole. */
static bool read_text(int fd, char *out, int *status)
{
    char *all = malloc(1 << 20);
    size_t n = 0, k = 0;
    if (!all) abort();
    for (ssize_t got; (got = recv(fd, all + n, (1 << 20) - 1 - n, 0)) > 0;) n += (size_t)got;
    all[n] = '\0';
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

static void bad_request(int fd)
{
    static const char *const rubbish[] = {
        "\x16\x03\x01\x02\x00\x01",
        "GET / HTTP/1.1\r\nX: \x01\xff\r\n\r\n",
        "POST /v1/completions HTTP/1.1\r\nContent-Length: 5\r\n\r\n{\"a\":",
        "POST /v1/completions HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n",
        "DELETE / HTTP/1.1\r\n\r\n",
        "POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: "
        "4\r\n\r\n4\r\nabcd\r\n",
        "POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 18\r\n\r\n{\"messages\":[[[[]]"
    };
    const char *r = rubbish[draw(sizeof rubbish / sizeof *rubbish)];
    char answer[4096];
    put(fd, r, strlen(r));
    struct pollfd p = { .fd = fd, .events = POLLIN };
    if (poll(&p, 1, 1000) > 0 &&
        recv(fd, answer, sizeof answer, 0) < 0) { // closed by the server: fine, too
    }
}

static int client(int requests)
{
    char text[MAX_ANSWER];
    int failed = 0, status;
    for (int i = 0; i < requests; i++) {
        const int prompt = (int)draw(N_PROMPTS), fd = connect_to();
        const uint64_t kind = draw(20);
        if (fd < 0) return failed + 1;
        if (kind < 6) { // leaves
            send_request(fd, prompt, draw(2));
            usleep((useconds_t)draw(200000));
            hang_up(fd);
        } else if (kind == 6) {
            bad_request(fd);
            hang_up(fd);
        } else if (kind == 7) { // trickles, then leaves
            for (int k = 0; k < 10; k++) {
                put(fd, "P", 1);
                usleep(10000);
            }
            hang_up(fd);
        } else if (kind == 8) { // does not read
            send_request(fd, prompt, true);
            usleep(300000);
            hang_up(fd);
        } else {
            send_request(fd, prompt, kind % 2);
            const bool whole = read_text(fd, text, &status);
            close(fd);
            if (status == 429) continue; // told why
            if (whole && status == 200 && strcmp(text, alone[prompt]) == 0) continue;
            fprintf(stderr, "prompt %d: status %d, %s: '%s' instead of '%s'\n", prompt, status,
                    whole ? "whole" : "cut", text, alone[prompt]);
            failed++;
        }
    }
    return failed;
}

int main(int argc, char **argv)
{
    if (argc != 5) return fprintf(stderr, "usage: serve_load PORT CLIENTS REQUESTS SEED\n"), 2;
    port = atoi(argv[1]);
    const int clients = atoi(argv[2]), requests = atoi(argv[3]);
    const uint64_t seed = strtoull(argv[4], NULL, 10);
    int failed = 0, status;

    for (int i = 0; i < N_PROMPTS; i++) {
        const int fd = connect_to();
        if (fd < 0) return fprintf(stderr, "nobody listens on port %d\n", port), 1;
        send_request(fd, i, false);
        if (!read_text(fd, alone[i], &status))
            return fprintf(stderr, "prompt %d alone: status %d\n", i, status), 1;
        close(fd);
    }
    for (int c = 0; c < clients; c++) {
        const int share = requests / clients + (c < requests % clients);
        const pid_t pid = fork();
        if (pid < 0) return perror("fork"), 1;
        if (pid > 0) continue;
        random_state = (seed * 1000003 + (uint64_t)c + 1) * 0x9E3779B97F4A7C15u;
        _exit(client(share) > 0);
    }
    for (int c = 0; c < clients; c++)
        if (wait(&status) < 0 || !WIFEXITED(status) || WEXITSTATUS(status) != 0) failed++;
    if (failed)
        fprintf(stderr, "%d of %d clients saw a wrong answer (seed %llu)\n", failed, clients,
                (unsigned long long)seed);
    return failed > 0;
}
