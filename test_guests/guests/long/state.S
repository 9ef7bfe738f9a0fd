// Holds known values in every register while the host takes the state out and puts it into another vCPU, many times. The host
// writes 1 to 0x8200 when it has moved it often enough.
#include "long.h"
#define ENOUGH 0x8200
#define PLACE  0x300000
.macro WR msr, value
        mov     ecx, \msr
        mov     rax, \value
        mov     rdx, rax
        shr     rdx, 32
        wrmsr
.endm
.macro SAME msr, value
        mov     ecx, \msr
        rdmsr
        shl     rdx, 32
        or      rax, rdx
        CHECK(rax, \value)
.endm
main:
        SETUP
        APIC_ON
        mov     dword ptr [rsi + 0x80], 0x30    // TPR
        mov     dword ptr [rsi + 0xd0], 0x40000000
        mov     dword ptr [rsi + 0x320], 0x10077
        xor     eax, eax
        mov     fs, eax
        mov     gs, eax
        WR      0xc0000081, 0x0018000800000000  // STAR
        WR      0xc0000082, 0xffff800012345678  // LSTAR
        WR      0xc0000084, 0x47700             // FMASK
        WR      0xc0000102, 0xffff8000abcdef00  // KERNEL_GS_BASE
        WR      0xc0000100, 0x400000            // FS_BASE
        WR      0xc0000101, 0x410000            // GS_BASE
        WR      0x174, 0x8
        WR      0x175, 0xffff800000001000
        WR      0x176, 0xffff800000002000
        WR      0x277, 0x0007040600070406       // PAT
        mov     rax, 0x100040
        mov     dr0, rax
        mov     rax, 0x123456789a
        mov     dr3, rax
        mov     rax, 0x40001000
        mov     cr2, rax
        IN_RING3 work
        // Everything as it was left?
        SAME    0xc0000081, 0x0018000800000000
        SAME    0xc0000082, 0xffff800012345678
        SAME    0xc0000084, 0x47700
        SAME    0xc0000102, 0xffff8000abcdef00
        SAME    0xc0000100, 0x400000
        SAME    0xc0000101, 0x410000
        SAME    0x174, 0x8
        SAME    0x175, 0xffff800000001000
        SAME    0x176, 0xffff800000002000
        SAME    0x277, 0x0007040600070406
        mov     rax, dr0
        CHECK(rax, 0x100040)
        mov     rax, dr3
        CHECK(rax, 0x123456789a)
        mov     rax, cr8
        CHECK(rax, 3)
        mov     esi, APIC
        CHECK32([rsi + 0xd0], 0x40000000)
        CHECK32([rsi + 0x320], 0x10077)
        str     eax
        CHECK32(eax, 0x40)
        mov     eax, ds
        CHECK32(eax, UDATA)
        FINISH

work:   mov     eax, UDATA
        mov     ds, eax
        mov     es, eax
        // x87 and SSE.
        fninit
        fldpi
        fld1
        mov     dword ptr [PLACE], 0x1f84       // MXCSR, one flag set
        ldmxcsr [PLACE]
        mov     rax, 0x0123456789abcdef
        movq    xmm0, rax
        not     rax
        movq    xmm15, rax
        punpcklqdq xmm15, xmm0
        mov     rax, 0x1111111111111111
        mov     rbx, 0x2222222222222222
        mov     rcx, 0x3333333333333333
        mov     rdx, 0x4444444444444444
        mov     rsi, 0x5555555555555555
        mov     rdi, 0x6666666666666666
        mov     rbp, 0x7777777777777777
        mov     r8, 0x8888888888888888
        mov     r9, 0x9999999999999999
        mov     r10, 0xaaaaaaaaaaaaaaaa
        mov     r11, 0xbbbbbbbbbbbbbbbb
        mov     r12, 0xcccccccccccccccc
        mov     r13, 0xdddddddddddddddd
        mov     r14, 0xeeeeeeeeeeeeeeee
        xor     r15d, r15d
1:      inc     r15
        mov     [PLACE + 8], r15
        cmp     r15, [PLACE + 8]
        jne     bad
        cmp     dword ptr [ENOUGH], 0
        je      1b
        mov     [PLACE + 0x10], rsp
        add     rax, rbx
        add     rax, rcx
        add     rax, rdx
        add     rax, rsi
        add     rax, rdi
        add     rax, rbp
        add     rax, r8
        add     rax, r9
        add     rax, r10
        add     rax, r11
        add     rax, r12
        add     rax, r13
        add     rax, r14
        mov     rbx, 0xfffffffffffffff9         // their sum, modulo 2^64
        cmp     rax, rbx
        jne     bad
        cmp     qword ptr [PLACE + 0x10], USER_STACK
        jne     bad
        movq    rax, xmm0
        mov     rbx, 0x0123456789abcdef
        cmp     rax, rbx
        jne     bad
        psrldq  xmm15, 8
        movq    rax, xmm15
        cmp     rax, rbx
        jne     bad
        stmxcsr [PLACE]
        cmp     dword ptr [PLACE], 0x1f84
        jne     bad
        fstp    qword ptr [PLACE]
        mov     rbx, 0x3ff0000000000000
        cmp     [PLACE], rbx
        jne     bad
        fstp    qword ptr [PLACE]
        mov     rbx, 0x400921fb54442d18
        cmp     [PLACE], rbx
        jne     bad
        hlt
bad:    mov     ecx, __LINE__
        mov     rbx, rax
        jmp     failed
