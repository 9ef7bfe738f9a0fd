// The x2APIC: registers as MSRs, self IPI, 64-bit ICR, CR8, faults on what is reserved.
#include "long.h"
.macro RD msr
        mov     ecx, \msr
        rdmsr
.endm
.macro WR msr, low, high=0
        mov     ecx, \msr
        mov     eax, \low
        mov     edx, \high
        wrmsr
.endm
main:
        SETUP
        RD      0x1b
        or      eax, 0xc00
        wrmsr
        RD      0x1b
        and     eax, 0xd00              // enabled, extended, bootstrap processor
        CHECK32(eax, 0xd00)
        mov     dword ptr [X2APIC], 1
        RD      0x802
        CHECK32(eax, 0)
        RD      0x803
        and     eax, 0xf0
        CHECK32(eax, 0x10)
        WR      0x80f, 0x1ff
        WR      0x808, 0
        sti
        WR      0x83f, 0x51             // self IPI
1:      pause
        cmp     dword ptr [COUNTS + 0x51 * 4], 1
        jne     1b
        WR      0x830, 0x52, 0          // ICR to ID 0
2:      pause
        cmp     dword ptr [COUNTS + 0x52 * 4], 1
        jne     2b
        WR      0x830, 0x40053, 0       // by shorthand
3:      pause
        cmp     dword ptr [COUNTS + 0x53 * 4], 1
        jne     3b
        // The logical ID follows from the APIC ID.
        RD      0x80d
        CHECK32(eax, 1)
        WR      0x830, 0x854, 1         // logical destination: cluster 0, first
4:      pause
        cmp     dword ptr [COUNTS + 0x54 * 4], 1
        jne     4b
        mov     eax, 5
        mov     cr8, rax
        RD      0x808
        CHECK32(eax, 0x50)
        xor     eax, eax
        mov     cr8, rax
        // The timer, by MSR.
        WR      0x83e, 0xb
        WR      0x832, 0x55
        WR      0x838, 100000
5:      hlt
        cmp     dword ptr [COUNTS + 0x55 * 4], 1
        jne     5b
        // Faults: a register that is not there, a reserved bit, a read-only register.
        mov     ecx, 0x80e
        FAULTS(13, 0, rdmsr)
        mov     ecx, 0x802
        xor     edx, edx
        FAULTS(13, 0, wrmsr)
        mov     ecx, 0x80b
        lea     rbx, [rip + 6f]
        mov     [FIXUP], rbx
        xor     eax, eax
        mov     edx, 1                  // the upper half is reserved
        wrmsr
        mov     ecx, __LINE__
        jmp     failed
6:      CHECK([R_VECTOR], 13)
        // The registers in memory are gone: device space answers.
        mov     esi, APIC
        mov     eax, [rsi + 0x30]
        CHECK32(eax, 0xffffffff)
        FINISH
