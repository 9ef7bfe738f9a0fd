// The local APIC's timer: one-shot, periodic, TSC deadline, masked, stopped.
#include "long.h"
#define DIVIDE   0x3e0
#define LVT      0x320
#define INITIAL  0x380
#define CURRENT  0x390
main:
        SETUP
        APIC_ON
        mov     dword ptr [rsi + DIVIDE], 0xb   // by 1
        // One-shot.
        mov     dword ptr [rsi + LVT], 0x45
        mov     dword ptr [rsi + INITIAL], 1000000
        sti
1:      hlt
        cmp     dword ptr [COUNTS + 0x45 * 4], 1
        jne     1b
        CHECK32([rsi + CURRENT], 0)
        // The count goes down.
        mov     dword ptr [rsi + INITIAL], 0xffffffff
        mov     eax, [rsi + CURRENT]
        mov     ecx, 100
2:      dec     ecx
        jnz     2b
        mov     edx, [rsi + CURRENT]
        cmp     edx, eax
        setb    dl
        movzx   edx, dl
        CHECK(rdx, 1)
        mov     dword ptr [rsi + INITIAL], 0    // stops it
        CHECK32([rsi + CURRENT], 0)
        // Periodic.
        mov     dword ptr [rsi + LVT], 0x20046
        mov     dword ptr [rsi + INITIAL], 2000000
3:      hlt
        cmp     dword ptr [COUNTS + 0x46 * 4], 5
        jb      3b
        mov     dword ptr [rsi + INITIAL], 0
        // Masked: nothing comes, but the count runs out.
        mov     dword ptr [rsi + LVT], 0x10047
        mov     dword ptr [rsi + INITIAL], 10000
4:      pause
        cmp     dword ptr [rsi + CURRENT], 0
        jne     4b
        CHECK32([COUNTS + 0x47 * 4], 0)
        // TSC deadline.
        mov     eax, 1
        cpuid
        bt      ecx, 24
        jnc     6f
        mov     dword ptr [rsi + LVT], 0x40048
        mov     r15d, 3
5:      cli
        rdtsc
        shl     rdx, 32
        or      rax, rdx
        add     rax, 3000000
        mov     r14, rax
        mov     rdx, rax
        shr     rdx, 32
        mov     ecx, 0x6e0
        wrmsr
        rdmsr
        shl     rdx, 32
        or      rax, rdx
        jz      armed                   // the host was busy: it is over already
        sub     rax, r14
        CHECK(rax, 0)
armed:
        sti
        hlt
        rdtsc
        shl     rdx, 32
        or      rax, rdx
        cmp     rax, r14
        setae   al
        movzx   eax, al
        CHECK(rax, 1)
        mov     ecx, 0x6e0              // disarmed by itself
        rdmsr
        or      eax, edx
        CHECK(rax, 0)
        dec     r15d
        jnz     5b
        CHECK32([COUNTS + 0x48 * 4], 3)
        // One that has passed fires at once.
        mov     ecx, 0x6e0
        mov     eax, 1
        xor     edx, edx
        wrmsr
6:      pause
        cmp     dword ptr [COUNTS + 0x48 * 4], 4
        jne     6b
        FINISH
