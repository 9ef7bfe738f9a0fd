// Non-maskable interrupts: taken with IF clear, out of HLT, one at a time until IRET.
#include "long.h"
#define NMI_NOW   1
#define NMI_LATER 2
#define NMI_MSG   3
main:
        SETUP
        APIC_ON
        cli
        mov     eax, NMI_NOW
        out     COMMAND, eax
1:      pause
        cmp     dword ptr [COUNTS + 2 * 4], 1
        jne     1b
        mov     eax, NMI_LATER
        out     COMMAND, eax
        hlt
        CHECK32([COUNTS + 2 * 4], 2)
        // As a message.
        mov     eax, NMI_MSG
        out     COMMAND, eax
2:      pause
        cmp     dword ptr [COUNTS + 2 * 4], 3
        jne     2b
        // One more comes while the handler runs: only after its IRET.
        lea     rax, [rip + nested]
        mov     [IHOOK], rax
        xor     r14d, r14d
        mov     eax, NMI_NOW
        out     COMMAND, eax
3:      pause
        cmp     dword ptr [COUNTS + 2 * 4], 5
        jne     3b
        CHECK(r14, 0)
        FINISH
nested: cmp     dword ptr [COUNTS + 2 * 4], 4
        jne     2f
        mov     eax, NMI_NOW
        out     COMMAND, eax
        mov     ecx, 300
1:      pause
        dec     ecx
        jnz     1b
        mov     r14d, [COUNTS + 2 * 4]
        sub     r14d, 4                 // must still be the fourth
2:      ret
