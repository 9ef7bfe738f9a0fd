// Application processors by INIT and startup IPIs, interprocessor interrupts, atomic additions. The host has put the number of
// processors at 0x8200.
#include "long.h"
#define NUMBER  0x8200
#define STARTED 0x8204
#define SUM     0x8208
#define READY   0x820c
#define STACKS  0x220000
#define TRAMPOLINE 0xa000
main:
        SETUP
        APIC_ON
        // The trampoline goes where a startup IPI can point.
        lea     rsi, [rip + trampoline]
        mov     edi, TRAMPOLINE
        mov     ecx, trampoline_end - trampoline
        rep movsb
        mov     esi, APIC
        mov     dword ptr [rsi + 0x300], 0xc4500                // INIT to all others
        mov     dword ptr [rsi + 0x300], 0xc4600 | TRAMPOLINE >> 12
        mov     dword ptr [rsi + 0x300], 0xc4600 | TRAMPOLINE >> 12
        mov     r15d, [NUMBER]
        dec     r15d
1:      pause
        cmp     [READY], r15d
        jne     1b
        CHECK32([STARTED], r15d)        // each started once
        // All but self.
        sti
        mov     dword ptr [rsi + 0x300], 0xc0050
2:      pause
        cmp     [COUNTS + 0x50 * 4], r15d
        jne     2b
        // All.
        mov     dword ptr [rsi + 0x300], 0x80051
        lea     r14d, [r15 + 1]
3:      pause
        cmp     [COUNTS + 0x51 * 4], r14d
        jne     3b
        // Self.
        mov     dword ptr [rsi + 0x300], 0x40052
4:      pause
        cmp     dword ptr [COUNTS + 0x52 * 4], 1
        jne     4b
        // Each by its ID; it answers with a message to us.
        mov     ebx, 1
5:      mov     eax, ebx
        shl     eax, 24
        mov     [rsi + 0x310], eax
        mov     dword ptr [rsi + 0x300], 0x53
6:      pause
        cmp     [COUNTS + 0x54 * 4], ebx
        jne     6b
        CHECK32([COUNTS + 0x53 * 4], ebx)
        inc     ebx
        cmp     ebx, r15d
        jbe     5b
        // Additions from all at once.
        mov     dword ptr [rsi + 0x300], 0xc0055
        mov     ecx, 500
7:      lock inc dword ptr [SUM]
        dec     ecx
        jnz     7b
        imul    ebx, r14d, 500
8:      pause
        cmp     [SUM], ebx
        jne     8b
        // An NMI to all others.
        mov     dword ptr [rsi + 0x300], 0xc0400
9:      pause
        cmp     [COUNTS + 2 * 4], r15d
        jne     9b
        FINISH

ap_main:
        lidt    [rip + idt_pointer]
        mov     eax, 1
        lock xadd [STARTED], eax
        inc     eax
        shl     eax, 12
        lea     rsp, [rax + STACKS]
        APIC_ON
        lea     rax, [rip + answer]
        mov     [IHOOK], rax
        lock inc dword ptr [READY]
1:      sti
        hlt
        jmp     1b
answer: mov     edi, APIC
        cmp     eax, 0x53
        jne     1f
        mov     dword ptr [rdi + 0x310], 0
        mov     dword ptr [rdi + 0x300], 0x54
        ret
1:      cmp     eax, 0x55
        jne     2f
        mov     ecx, 500
3:      lock inc dword ptr [SUM]
        dec     ecx
        jnz     3b
2:      ret

.code16
trampoline:
        cli
        mov     ax, cs
        mov     ds, ax
        lgdt    [t_gdt - trampoline]
        mov     eax, 0x620              // PAE, OSFXSR, OSXMMEXCPT
        mov     cr4, eax
        mov     eax, 0x1000
        mov     cr3, eax
        mov     ecx, 0xc0000080
        mov     eax, 0x900              // LME, NXE
        xor     edx, edx
        wrmsr
        mov     eax, 0x80010013         // PG, WP, ET, MP, PE
        mov     cr0, eax
        .byte   0x66, 0xea
        .long   TRAMPOLINE + t_long - trampoline
        .word   KCODE
t_gdt:  .word   0x5f
        .long   0x6000
.code64
t_long: mov     eax, KDATA
        mov     ds, eax
        mov     es, eax
        mov     ss, eax
        movabs  rax, offset ap_main
        jmp     rax
trampoline_end:
