/* For tests in a guest: carries standard input and output over a socket of the AF_VSOCK family.
 *
 * vsock connect PORT: to the host. vsock listen PORT: for one connection from it. Ends when the other side has. */
#include <linux/vm_sockets.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static int carry(int from, int to) {
    char buffer[65536];
    ssize_t n = read(from, buffer, sizeof buffer);
    for (ssize_t done = 0; done < n;) {
        ssize_t written = write(to, buffer + done, n - done);
        if (written <= 0)
            return -1;
        done += written;
    }
    return n;
}

static int open_socket(int listening, unsigned port) {
    struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_port = port};
    address.svm_cid = listening ? VMADDR_CID_ANY : VMADDR_CID_HOST;
    int s = socket(AF_VSOCK, SOCK_STREAM, 0);
    if (s < 0)
        return -1;
    if (!listening)
        return connect(s, (struct sockaddr *)&address, sizeof address) ? -1 : s;
    if (bind(s, (struct sockaddr *)&address, sizeof address) || listen(s, 1))
        return -1;
    puts("VSOCK-LISTENS");
    fflush(stdout);
    return accept(s, NULL, NULL);
}

int main(int argc, char **argv) {
    int s = argc == 3 ? open_socket(!strcmp(argv[1], "listen"), atoi(argv[2])) : -1;
    if (s < 0) {
        perror("vsock");
        return 1;
    }
    struct pollfd ends[2] = {{.fd = 0, .events = POLLIN}, {.fd = s, .events = POLLIN}};
    for (;;) {
        poll(ends, 2, -1);
        if (ends[0].revents && carry(0, s) <= 0) {
            shutdown(s, SHUT_WR);
            ends[0].fd = -1;
        }
        if (ends[1].revents && carry(s, 1) <= 0)
            return 0;
    }
}
