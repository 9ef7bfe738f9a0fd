// Breakpoints by the debug registers.
#include "long.h"
main:
        SETUP
        lea     rax, [rip + trap]
        mov     [HOOK], rax
        // An instruction breakpoint: before the instruction, with RF it goes on.
        xor     r12d, r12d
        xor     r13d, r13d
        lea     rax, [rip + here]
        mov     dr0, rax
        mov     eax, 0x402                      // global, DR0
        mov     dr7, rax
        IN_RING3 broken
        CHECK(r12, 1)
        CHECK(r13, 1)
        CHECK(r11, 7)
        lea     rax, [rip + here]
        sub     rax, r10
        CHECK(rax, 0)
        // A data breakpoint: writes of four bytes at 0x200000, after the instruction.
        xor     r12d, r12d
        xor     r13d, r13d
        mov     eax, 0x200000
        mov     dr1, rax
        mov     eax, 0x00d00408                 // DR1: global, write, 4 bytes
        mov     dr7, rax
        IN_RING3 watched
        CHECK(r12, 2)
        CHECK(r13, 2)
        xor     eax, eax
        mov     dr7, rax
        FINISH
broken: mov     r11d, 3
here:   add     r11d, 4
        hlt
watched:
        mov     dword ptr [0x200000], 1
        mov     eax, [0x200000]                 // a read is none
        mov     dword ptr [0x200008], 1         // nor is this
        mov     byte ptr [0x200003], 1
        hlt
// RAX: vector, RDI: frame (RIP, CS, RFLAGS, ...).
trap:   cmp     eax, 1
        jne     unexpected
        inc     r12
        mov     r10, [rdi]
        mov     rax, dr6
        and     eax, 0x600f
        or      r13, rax
        mov     rax, dr6
        and     eax, ~0x600f
        mov     dr6, rax
        or      qword ptr [rdi + 16], 0x10000   // RF
        ret
