// The 8259's interrupts through LINT0.
#include "long.h"
#define NOW_21   1
#define LATER_22 2
#define NOW_23_24 3
main:
        SETUP
        APIC_ON
        mov     dword ptr [rsi + 0x350], 0x700  // LVT LINT0: ExtINT
        sti
        mov     eax, NOW_21
        out     COMMAND, eax
1:      pause
        cmp     dword ptr [COUNTS + 0x21 * 4], 1
        jne     1b
        // Out of HLT.
        mov     r15d, 5
2:      cli
        mov     eax, LATER_22
        out     COMMAND, eax
        sti
        hlt
        dec     r15d
        jnz     2b
        CHECK32([COUNTS + 0x22 * 4], 5)
        // Held back by IF; two in a row.
        cli
        mov     eax, NOW_23_24
        out     COMMAND, eax
        mov     ecx, 200
3:      pause
        dec     ecx
        jnz     3b
        CHECK32([COUNTS + 0x23 * 4], 0)
        sti
4:      pause
        cmp     dword ptr [COUNTS + 0x24 * 4], 1
        jne     4b
        CHECK32([COUNTS + 0x23 * 4], 1)
        // Masked at LINT0: nothing; unmasked: there it is.
        mov     dword ptr [rsi + 0x350], 0x10700
        mov     eax, NOW_21
        out     COMMAND, eax
        mov     ecx, 200
5:      pause
        dec     ecx
        jnz     5b
        CHECK32([COUNTS + 0x21 * 4], 1)
        mov     dword ptr [rsi + 0x350], 0x700
6:      pause
        cmp     dword ptr [COUNTS + 0x21 * 4], 2
        jne     6b
        FINISH
