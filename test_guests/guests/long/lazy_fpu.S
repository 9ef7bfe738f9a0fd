// CR0.TS and CR0.EM keep the floating-point unit away, from x87 and SSE, until CLTS.
#include "long.h"
main:
        SETUP
        mov     rax, cr0
        or      eax, 8
        mov     cr0, rax
        lea     rax, [rip + after]
        mov     [FIXUP], rax
        mov     qword ptr [R_VECTOR], 0
        IN_RING3 touches
        CHECK([R_VECTOR], 7)
        lea     rax, [rip + after]
        mov     [FIXUP], rax
        mov     qword ptr [R_VECTOR], 0
        IN_RING3 adds
        CHECK([R_VECTOR], 7)
        clts
        mov     qword ptr [R_VECTOR], 0
        IN_RING3 touches
        CHECK([R_VECTOR], 0)
        // EM: SSE is #UD then.
        mov     rax, cr0
        or      eax, 4
        mov     cr0, rax
        lea     rax, [rip + after]
        mov     [FIXUP], rax
        IN_RING3 adds
        CHECK([R_VECTOR], 6)
        FINISH
touches:
        fld1
        hlt
adds:   addps   xmm0, xmm1
        hlt
after:  hlt
