// AVX and XSAVE in ring 3, where CPUID has them.
#include "long.h"
#define PLACE 0x300000
main:
        SETUP
        mov     eax, 1
        cpuid
        and     ecx, 0x14000000         // XSAVE and AVX
        cmp     ecx, 0x14000000
        jne     none
        mov     rax, cr4
        or      eax, 0x40000            // OSXSAVE
        mov     cr4, rax
        xor     ecx, ecx
        xor     edx, edx
        mov     eax, 7
        xsetbv
        mov     eax, 0xd
        xor     ecx, ecx
        cpuid
        CHECK32(ebx, 832)               // legacy, header, upper halves
        // Reserved values of XCR0.
        xor     ecx, ecx
        xor     edx, edx
        lea     rbx, [rip + bad_0]
        mov     [FIXUP], rbx
        mov     eax, 6                  // no x87
        xsetbv
        mov     ecx, __LINE__
        jmp     failed
bad_0:  CHECK([R_VECTOR], 13)
        xor     ecx, ecx
        xgetbv
        CHECK32(eax, 7)
        IN_RING3 user
        CHECK([PLACE + 0x800], 0x0000000600000006)
        CHECK([PLACE + 0x818], 0x0000000600000006)
        CHECK([PLACE + 0x820], 0x0000000600000006)
        CHECK([PLACE + 0x838], 0x0000000600000006)
        CHECK([PLACE + 0x850], 0)       // the upper half is gone
        CHECK([PLACE + 0x840], 0x0000000600000006)
none:   FINISH
user:   mov     ebx, PLACE
        mov     dword ptr [rbx], 2
        vpbroadcastd ymm0, [rbx]
        mov     dword ptr [rbx], 4
        vpbroadcastd ymm1, [rbx]
        vpaddd  ymm2, ymm0, ymm1
        vmovdqu [rbx + 0x800], ymm2
        // Through XSAVE and XRSTOR.
        mov     eax, 7
        xor     edx, edx
        xsave   [rbx + 0x1000]
        vpxor   ymm2, ymm2, ymm2
        mov     eax, 7
        xor     edx, edx
        xrstor  [rbx + 0x1000]
        vmovdqu [rbx + 0x820], ymm2
        // 128-bit operations clear the upper half.
        vmovdqa xmm3, xmm2
        vmovdqu [rbx + 0x840], ymm3
        vzeroupper
        hlt
