// Writes pages for the dirty log: 0x210, 0x215, 0x2ff and 0x300 (one access over their border) after the first command, none
// after the second, 0x210 after the third.
#include "long.h"
main:
        SETUP
        mov     dword ptr [0x2f0000], 1         // before the log
        mov     eax, 1
        out     COMMAND, eax
        mov     eax, [0x220000]                 // a read
        mov     dword ptr [0x210000], 1
        mov     byte ptr [0x215fff], 1
        mov     rax, -1
        mov     [0x2ffffc], rax
        mov     eax, 2
        out     COMMAND, eax
        mov     eax, [0x210000]
        mov     eax, 3
        out     COMMAND, eax
        lock or dword ptr [0x210000], 2
        mov     eax, 4
        out     COMMAND, eax
        FINISH
