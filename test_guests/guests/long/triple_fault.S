// No handlers at all: the machine shuts down.
#include "long.h"
main:
        mov     rsp, STACK
        push    0
        push    0
        lidt    [rsp]
        ud2
        FINISH
