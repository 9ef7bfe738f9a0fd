// Interrupts from events that the host signals.
#include "long.h"
main:
        SETUP
        APIC_ON
        sti
        mov     eax, 1
        out     COMMAND, eax
1:      pause
        cmp     dword ptr [COUNTS + 0x41 * 4], 1
        jne     1b
        mov     eax, 2                          // another message for the same event
        out     COMMAND, eax
2:      pause
        cmp     dword ptr [COUNTS + 0x42 * 4], 1
        jne     2b
        mov     eax, 3                          // another event; the first one is removed and signalled
        out     COMMAND, eax
3:      pause
        cmp     dword ptr [COUNTS + 0x43 * 4], 1
        jne     3b
        mov     ecx, 500
4:      pause
        dec     ecx
        jnz     4b
        CHECK32([COUNTS + 0x41 * 4], 1)
        CHECK32([COUNTS + 0x42 * 4], 1)
        FINISH
