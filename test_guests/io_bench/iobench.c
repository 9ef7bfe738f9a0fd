/* Drives a disk or a network card of a guest as hard as it can, for `cargo xtask bench devices`.
 *
 * iobench disk DEVICE NAME SECONDS      sequential and random, direct and asynchronous; overwrites the device
 * iobench net ADDRESS PORT SECONDS      TCP against the server of xtask
 *
 * Each measurement prints "BENCH-BEGIN name" and, when it is over, "BENCH-END operations bytes": who listens on the host
 * takes the time and counts the processor's seconds in between. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/fs.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { MOST = 64, MESSAGE = 64, PIECE = 256 << 10 };

static double seconds;

static void fail(const char *what) {
    printf("BENCH-FAILED %s: %s\n", what, strerror(errno));
    fflush(stdout);
    exit(1);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static double begin(const char *prefix, const char *name) {
    printf("BENCH-BEGIN %s%s\n", prefix, name);
    fflush(stdout);
    return now() + seconds;
}

static void end(uint64_t operations, uint64_t bytes) {
    printf("BENCH-END %lu %lu\n", operations, bytes);
    fflush(stdout);
}

static uint64_t next_random(void) {
    static uint64_t x = 0x9e3779b97f4a7c15;
    x ^= x << 13, x ^= x >> 7, x ^= x << 17;
    return x;
}

/* ---- disk */

struct pattern {
    const char *name;
    int write, random, depth;
    size_t block;
};

static const struct pattern patterns[] = {
    {"seq-read-1M", 0, 0, 4, 1 << 20},     {"seq-write-1M", 1, 0, 4, 1 << 20},
    {"rand-read-4k-q1", 0, 1, 1, 4096},    {"rand-write-4k-q1", 1, 1, 1, 4096},
    {"rand-read-4k-q32", 0, 1, 32, 4096},  {"rand-write-4k-q32", 1, 1, 32, 4096},
};

static void submit(aio_context_t context, struct iocb **list, long count) {
    while (count > 0) {
        long n = syscall(SYS_io_submit, context, count, list);
        if (n <= 0)
            fail("io_submit");
        list += n, count -= n;
    }
}

static void run_pattern(const struct pattern *p, int fd, uint64_t size, char *memory, const char *prefix) {
    aio_context_t context = 0;
    struct iocb blocks[MOST], *list[MOST];
    struct io_event events[MOST];
    uint64_t count = size / p->block, position = 0, done = 0;
    if (syscall(SYS_io_setup, MOST, &context))
        fail("io_setup");
    double until = begin(prefix, p->name);
    long free_blocks = p->depth, flying = 0;
    memset(blocks, 0, sizeof blocks);
    for (int i = 0; i < p->depth; i++)
        list[i] = &blocks[i];
    for (;;) {
        if (now() < until) {
            for (long i = 0; i < free_blocks; i++) {
                uint64_t number = (p->random ? next_random() : position++) % count;
                struct iocb *b = list[i];
                b->aio_lio_opcode = p->write ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD;
                b->aio_fildes = fd;
                b->aio_buf = (uintptr_t)memory + (b - blocks) * p->block;
                b->aio_nbytes = p->block;
                b->aio_offset = number * p->block;
                b->aio_data = (uintptr_t)b;
            }
            submit(context, list, free_blocks);
            flying += free_blocks, free_blocks = 0;
        }
        if (!flying)
            break;
        long n = syscall(SYS_io_getevents, context, 1L, (long)MOST, events, NULL);
        if (n <= 0)
            fail("io_getevents");
        for (long i = 0; i < n; i++) {
            if (events[i].res != (int64_t)p->block) {
                errno = events[i].res < 0 ? -events[i].res : EIO;
                fail(p->name);
            }
            list[free_blocks + i] = (struct iocb *)(uintptr_t)events[i].data;
        }
        free_blocks += n, flying -= n, done += n;
    }
    end(done, done * p->block);
    syscall(SYS_io_destroy, context);
}

static void disk(const char *device, const char *name) {
    char prefix[64];
    uint64_t size;
    size_t room = 4 << 20;
    int fd = open(device, O_RDWR | O_DIRECT);
    if (fd < 0 || ioctl(fd, BLKGETSIZE64, &size))
        fail(device);
    char *memory = mmap(NULL, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        fail("mmap");
    for (size_t i = 0; i < room; i += 8)
        *(uint64_t *)(memory + i) = next_random();
    snprintf(prefix, sizeof prefix, "%s:", name);
    for (size_t i = 0; i < sizeof patterns / sizeof *patterns; i++)
        run_pattern(&patterns[i], fd, size, memory, prefix);
    /* What is in the host's cache must not be written while the next disk is measured. */
    if (fsync(fd))
        fail("fsync");
    close(fd);
}

/* ---- network */

static struct sockaddr_in server;

/* A connection; the first byte tells the server what it is for. */
static int reach(char service) {
    int s = socket(AF_INET, SOCK_STREAM, 0), one = 1;
    if (s < 0 || connect(s, (struct sockaddr *)&server, sizeof server))
        fail("connect");
    setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (write(s, &service, 1) != 1)
        fail("write");
    return s;
}

static char piece[PIECE];

static void receive_stream(void) {
    int s = reach('S');
    uint64_t bytes = 0, calls = 0;
    double until = begin("net:", "stream-to-guest");
    while (now() < until) {
        ssize_t n = read(s, piece, sizeof piece);
        if (n <= 0)
            fail("read");
        bytes += n, calls++;
    }
    end(calls, bytes);
    close(s);
}

static void send_stream(void) {
    int s = reach('K');
    uint64_t bytes = 0, calls = 0;
    double until = begin("net:", "stream-to-host");
    while (now() < until) {
        ssize_t n = write(s, piece, sizeof piece);
        if (n <= 0)
            fail("write");
        bytes += n, calls++;
    }
    /* It is over when the server has all of it: then it closes. */
    shutdown(s, SHUT_WR);
    if (read(s, piece, 1) != 0)
        fail("read");
    end(calls, bytes);
    close(s);
}

static void request_response(void) {
    int s = reach('E');
    uint64_t count = 0;
    double until = begin("net:", "request-response");
    for (; now() < until; count++) {
        if (write(s, piece, MESSAGE) != MESSAGE)
            fail("write");
        for (ssize_t have = 0; have < MESSAGE;) {
            ssize_t n = read(s, piece, MESSAGE - have);
            if (n <= 0)
                fail("read");
            have += n;
        }
    }
    end(count, count * MESSAGE * 2);
    close(s);
}

static void connections(void) {
    uint64_t count = 0;
    double until = begin("net:", "connections");
    for (; now() < until; count++) {
        int s = reach('C');
        if (read(s, piece, 1) != 1)
            fail("read");
        close(s);
    }
    end(count, count);
}

int main(int argc, char **argv) {
    if (argc != 5)
        return 2;
    seconds = atof(argv[4]);
    if (!strcmp(argv[1], "disk")) {
        disk(argv[2], argv[3]);
        return 0;
    }
    server.sin_family = AF_INET;
    server.sin_addr.s_addr = inet_addr(argv[2]);
    server.sin_port = htons(atoi(argv[3]));
    receive_stream();
    send_stream();
    request_response();
    connections();
    return 0;
}
