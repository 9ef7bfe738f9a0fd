// A fault whose delivery faults is a double fault, on IST 1 with error code 0.
#include "long.h"
main:
        SETUP
        lea     rax, [rip + caught]
        mov     [HOOK], rax
        mov     rbp, 0x90000
        // The #PF's frame can't be pushed: the stack is not there.
        mov     ebx, 0x40000000
        mov     rsp, 0x40010000
        mov     rax, [rbx]
        mov     ecx, __LINE__
        jmp     failed
caught: cmp     eax, 8
        jne     unexpected
        mov     rax, rsp
        shr     rax, 12
        CHECK(rax, 0x77)                        // IST 1 ends at 0x78000
        CHECK([R_ERROR], 0)
        CHECK([R_RSP], 0x40010000)
        CHECK([R_CR2], 0x4000fff8)
        FINISH
