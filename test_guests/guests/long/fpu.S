// x87 and SSE in ring 3: results, control words, unmasked exceptions, FXSAVE.
#include "long.h"
#define PLACE 0x300000
main:
        SETUP
        mov     rax, cr0
        or      eax, 0x22               // NE, MP
        and     eax, ~0xc               // EM, TS
        mov     cr0, rax
        IN_RING3 arithmetic
        CHECK([PLACE + 0x100], 0x4008000000000000)      // 1 + 2
        CHECK([PLACE + 0x108], 0x3fd5555555555555)      // 1 / 3
        CHECK([PLACE + 0x110], 0x3ff6a09e667f3bcd)      // square root of 2
        CHECK([PLACE + 0x118], 0xffffffffffffff85)      // -123 by FISTP
        CHECK([PLACE + 0x120], 0x4024000000000000)      // 4 + 6 by ADDPD
        CHECK([PLACE + 0x128], 0x4034000000000000)      // 2 * 10
        CHECK([PLACE + 0x130], 0x0000000400000003)      // CVTTPS2DQ of 3.7, 4.2
        CHECK([PLACE + 0x138], 0x037f)
        CHECK([PLACE + 0x140], 0x3fd5555555555556)      // 1 / 3 rounded up
        // #MF of an unmasked divide by zero, at the next waiting instruction.
        lea     rax, [rip + after]
        mov     [FIXUP], rax
        mov     qword ptr [R_VECTOR], 0
        IN_RING3 divides
        CHECK([R_VECTOR], 16)
        // #XM of SSE.
        mov     rax, cr4
        or      eax, 0x600
        mov     cr4, rax
        lea     rax, [rip + after]
        mov     [FIXUP], rax
        mov     qword ptr [R_VECTOR], 0
        IN_RING3 sse_divides
        CHECK([R_VECTOR], 19)
        CHECK32([PLACE], 0x1d84)                        // MXCSR with ZE set and unmasked
        IN_RING3 saves
        CHECK([PLACE + 0x600], 0x1122334455667788)
        CHECK([PLACE + 0x608], 0x3ff0000000000000)
        CHECK32([PLACE + 0x200 + 24], 0x1f80)
        FINISH
arithmetic:
        mov     ebx, PLACE
        fninit
        fld1
        fld1
        fadd    st, st(1)
        faddp
        fstp    qword ptr [rbx + 0x100]
        fld1
        mov     dword ptr [rbx], 3
        fild    dword ptr [rbx]
        fdivp
        fstp    qword ptr [rbx + 0x108]
        mov     dword ptr [rbx], 2
        fild    dword ptr [rbx]
        fsqrt
        fstp    qword ptr [rbx + 0x110]
        mov     dword ptr [rbx], -123
        fild    dword ptr [rbx]
        fistp   qword ptr [rbx + 0x118]
        mov     qword ptr [rbx + 0x138], 0
        fnstcw  [rbx + 0x138]
        mov     rax, 0x4010000000000000         // 4
        movq    xmm0, rax
        mov     rax, 0x4018000000000000         // 6
        movq    xmm1, rax
        addsd   xmm0, xmm1
        movsd   [rbx + 0x120], xmm0
        mov     rax, 0x4000000000000000         // 2
        movq    xmm1, rax
        mulsd   xmm1, xmm0
        movsd   [rbx + 0x128], xmm1
        mov     rax, 0x40866666406ccccd         // 4.2, 3.7
        movq    xmm2, rax
        cvttps2dq xmm2, xmm2
        movq    [rbx + 0x130], xmm2
        mov     dword ptr [rbx], 0x5f80         // round up
        ldmxcsr [rbx]
        mov     rax, 0x3ff0000000000000
        movq    xmm3, rax
        mov     rax, 0x4008000000000000
        movq    xmm4, rax
        divsd   xmm3, xmm4
        movsd   [rbx + 0x140], xmm3
        mov     dword ptr [rbx], 0x1f80
        ldmxcsr [rbx]
        hlt
divides:
        fninit
        mov     word ptr [PLACE], 0x37b         // ZM clear
        fldcw   [PLACE]
        fld1
        fldz
        fdivp
        fwait
        hlt
sse_divides:
        mov     dword ptr [PLACE], 0x1d80       // ZM clear
        ldmxcsr [PLACE]
        mov     rax, 0x3ff0000000000000
        movq    xmm0, rax
        pxor    xmm1, xmm1
        divsd   xmm0, xmm1
        hlt
after:  stmxcsr [PLACE]
        fninit
        mov     dword ptr [PLACE + 8], 0x1f80
        ldmxcsr [PLACE + 8]
        hlt
saves:  fninit
        fld1
        mov     rax, 0x1122334455667788
        movq    xmm7, rax
        fxsave  [PLACE + 0x200]
        fninit
        pxor    xmm7, xmm7
        fxrstor [PLACE + 0x200]
        movq    [PLACE + 0x600], xmm7
        fstp    qword ptr [PLACE + 0x608]
        hlt
