// Exceptions with their error codes, faulting addresses, CR2, and the double fault on a stack of its own.
#include "long.h"
main:
        SETUP
        xor     ecx, ecx
        FAULTS(0, 0, div ecx)
        FAULTS(6, 0, ud2)
        // Non-canonical address: #GP(0), by way of the stack #SS(0).
        mov     rbx, 0x8000000000000000
        FAULTS(13, 0, mov rcx, [rbx])
        mov     rbp, 0x8000000000000000
        FAULTS(12, 0, mov rcx, [rbp])
        // A selector beyond the GDT's limit.
        mov     ecx, 0xff8
        FAULTS(13, 0xff8, mov ds, ecx)
        // A segment that is not present.
        mov     ecx, ABSENT
        FAULTS(11, ABSENT, mov ds, ecx)
        FAULTS(12, ABSENT, mov ss, ecx)
        // Pages: not present, read and write (the first GiB is mapped, the second is not).
        mov     ebx, 0x40001234
        FAULTS(14, 0, mov rcx, [rbx])
        mov     rcx, 0x40001234
        CHECK([R_CR2], 0x40001234)
        FAULTS(14, 2, mov [rbx], rcx)
        // Fetch from a page that is not there.
        lea     rax, [rip + 1f]
        mov     [FIXUP], rax
        jmp     rbx
1:      CHECK([R_VECTOR], 14)
        CHECK([R_RIP], 0x40001234)
        CHECK([R_CR2], 0x40001234)
        // A read-only page (2 MiB at 0x200000) under CR0.WP, then without.
        mov     rbx, [0x3008]
        and     qword ptr [0x3008], ~2
        invlpg  [0x200000]
        FAULTS(14, 3, mov dword ptr [0x200010], 5)
        CHECK([R_CR2], 0x200010)
        mov     rcx, [0x200010]
        CHECK(rcx, 0)
        mov     [0x3008], rbx
        invlpg  [0x200000]
        mov     dword ptr [0x200010], 5
        CHECK32([0x200010], 5)
        // A reserved bit (51 of a present entry): error code 9.
        mov     rbx, [0x3008]
        mov     rcx, 1 << 51
        or      rcx, rbx
        mov     [0x3008], rcx
        invlpg  [0x200000]
        FAULTS(14, 9, mov rcx, [0x200010])
        mov     [0x3008], rbx
        invlpg  [0x200000]
        // A control register bit that is reserved.
        mov     rcx, 1 << 40
        FAULTS(13, 0, mov cr4, rcx)
        // Loading CR0 with PG but not PE.
        mov     rcx, cr0
        and     rcx, ~1
        FAULTS(13, 0, mov cr0, rcx)
        FINISH
