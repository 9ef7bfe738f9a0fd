// Writes values of all kinds to every register of the local APIC, as memory and as MSRs, and sends itself whatever comes of it.
// The host may stop us anywhere.
#include "long.h"
main:
        SETUP
        lea     rax, [rip + skip]
        mov     [HOOK], rax
        mov     r15d, [0x8200]          // the host's seed
        mov     esi, APIC
        mov     r14d, 1500
1:      imul    r15d, r15d, 1103515245
        add     r15d, 12345
        mov     eax, r15d
        shr     eax, 9
        and     eax, 0x3f0
        imul    r15d, r15d, 1103515245
        add     r15d, 12345
        mov     edx, r15d
        cmp     eax, 0x300              // INIT to oneself would end it
        jne     2f
        and     edx, 0xfffff8ff
2:      mov     [rsi + rax], edx
        mov     edx, [rsi + rax]
        mov     word ptr [rsi + rax + 1], dx
        mov     dl, [rsi + rax + 3]
        dec     r14d
        jnz     1b
        mov     ecx, 0x1b
        rdmsr
        or      eax, 0xc00
        wrmsr
        mov     dword ptr [X2APIC], 1
        mov     r14d, 1500
3:      imul    r15d, r15d, 1103515245
        add     r15d, 12345
        mov     ecx, r15d
        shr     ecx, 12
        and     ecx, 0x7f
        add     ecx, 0x800
        imul    r15d, r15d, 1103515245
        add     r15d, 12345
        mov     eax, r15d
        mov     edx, r15d
        shr     edx, 30
        cmp     ecx, 0x830
        jne     4f
        and     eax, 0xfffff8ff
4:      wrmsr
        rdmsr
        dec     r14d
        jnz     3b
        FINISH
// Goes on behind the RDMSR, WRMSR or whatever it was (two bytes).
skip:   add     qword ptr [rdi], 2
        ret
