// Instructions that kernels use and that a KVM which interprets ring 0 can't do: they are completed by the emulator.
#include "long.h"
#define PLACE 0x300000
main:
        SETUP
        // A breakpoint: a trap, RIP behind it.
        lea     rax, [rip + trap]
        mov     [HOOK], rax
        xor     r12d, r12d
        int3
after:  CHECK(r12, 1)
        lea     rax, [rip + after]
        sub     rax, r11
        CHECK(rax, 0)
        // INT n by a gate of ring 0.
        int     0x50
        CHECK32([COUNTS + 0x50 * 4], 1)
        mov     qword ptr [HOOK], 0
        // CMPXCHG16B.
        mov     rax, 1
        mov     [PLACE], rax
        inc     eax
        mov     [PLACE + 8], rax
        mov     eax, 1
        mov     edx, 2
        mov     ebx, 3
        mov     ecx, 4
        lock cmpxchg16b [PLACE]
        setz    dil
        movzx   edi, dil
        CHECK(rdi, 1)
        CHECK([PLACE], 3)
        CHECK([PLACE + 8], 4)
        lock cmpxchg16b [PLACE]
        setz    dil
        movzx   edi, dil
        CHECK(rdi, 0)
        CHECK(rax, 3)
        CHECK(rdx, 4)
        // Vector registers and their saving in ring 0.
        mov     rax, 0x123456789abcdef0
        movq    xmm3, rax
        fxsave  [PLACE + 0x200]
        pxor    xmm3, xmm3
        fxrstor [PLACE + 0x200]
        movq    rax, xmm3
        CHECK(rax, 0x123456789abcdef0)
        mov     eax, 1
        cpuid
        bt      ecx, 26
        jnc     none
        mov     rax, cr4
        or      eax, 0x40000
        mov     cr4, rax
        xor     ecx, ecx
        xor     edx, edx
        mov     eax, 3
        xsetbv
        xsave   [PLACE + 0x1000]
        pxor    xmm3, xmm3
        mov     eax, 3
        xor     edx, edx
        xrstor  [PLACE + 0x1000]
        movq    rax, xmm3
        CHECK(rax, 0x123456789abcdef0)
none:
        // Bits and rotations that kernels love.
        mov     rax, 0x8000000000000001
        popcnt  rcx, rax
        CHECK(rcx, 2)
        bswap   rax
        CHECK(rax, 0x0100000000000080)
        FINISH
trap:   cmp     eax, 3
        jne     unexpected
        inc     r12
        mov     r11, [rdi]
        ret
