// Waits in HLT for vector 0x41, with known registers.
#include "long.h"
main:
        SETUP
        APIC_ON
        mov     r12, 0x123456789abcdef0
        sti
1:      hlt
        cmp     dword ptr [COUNTS + 0x41 * 4], 1
        jne     1b
        CHECK(r12, 0x123456789abcdef0)
        FINISH
