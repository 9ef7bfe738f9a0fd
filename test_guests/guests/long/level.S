// Level-triggered interrupts: the end is told to whoever sent them; that of edge-triggered ones is not.
#include "long.h"
#define EDGE_61  1
#define LEVEL_62 2
main:
        SETUP
        APIC_ON
        sti
        mov     eax, EDGE_61
        out     COMMAND, eax
1:      pause
        cmp     dword ptr [COUNTS + 0x61 * 4], 1
        jne     1b
        mov     r15d, 3
2:      mov     eax, LEVEL_62
        out     COMMAND, eax
        dec     r15d
        jnz     2b
3:      pause
        cmp     dword ptr [COUNTS + 0x62 * 4], 3
        jne     3b
        // While one is in service, the trigger-mode register says level.
        lea     rax, [rip + look]
        mov     [IHOOK], rax
        mov     eax, LEVEL_62
        out     COMMAND, eax
4:      pause
        cmp     dword ptr [COUNTS + 0x62 * 4], 4
        jne     4b
        CHECK(r14, 4)
        // The interrupt that the host sends at the end of one.
        mov     qword ptr [IHOOK], 0
        mov     dword ptr [rsi + 0xb0], 0       // an EOI with nothing in service is nothing
        FINISH
look:   mov     edi, APIC
        mov     r14d, [rdi + 0x180 + 0x30]      // TMR, vectors 0x60 to 0x7f
        mov     eax, [rdi + 0x100 + 0x30]       // ISR, for the host to look at
        out     REPORT, eax
        ret
