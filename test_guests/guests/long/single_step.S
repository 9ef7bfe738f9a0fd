// Single step.
#include "long.h"
main:
        SETUP
        lea     rax, [rip + trap]
        mov     [HOOK], rax
        // Single step in ring 3: a trap after each of the instructions.
        xor     r12d, r12d
        xor     r13d, r13d
        mov     r14d, 1                         // TF goes off again at the third
        IN_RING3 stepped
        CHECK(r12, 3)
        CHECK(r13, 0x4000)                      // DR6.BS
        FINISH
stepped:
        push    0x3302
        popfq                                   // TF
        nop
        nop
        nop
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
        test    r14d, r14d
        jz      1f
        cmp     r12d, 3
        jb      1f
        and     qword ptr [rdi + 16], ~0x100
1:      ret
