// Runs until the host ends it: in ring 0, in ring 3, or in HLT, as 0x8200 says.
#include "long.h"
main:
        SETUP
        cmp     dword ptr [0x8200], 1
        je      2f
        cmp     dword ptr [0x8200], 2
        je      3f
1:      jmp     1b
2:      IN_RING3 4f
3:      cli
        hlt
        jmp     3b
4:      jmp     4b
