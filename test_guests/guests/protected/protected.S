// 32-bit protected mode: segment limits and types, rings by a far return and a call gate, a task state segment, two-level paging
// with 4 MiB pages, virtual-8086 mode left out.
#include "ports.h"
.intel_syntax noprefix
.code32
.text
image:
        jmp     main
fail_at:                                // ECX: line
        mov     eax, ecx
        out     FAIL, eax
1:      hlt
        jmp     1b
.macro WANT a, b, line
        cmp     \a, \b
        mov     ecx, \line
        jne     fail_at
.endm
#define CHECK_(a, b) WANT #a, b, __LINE__
#define CHECK(a, b) CHECK_(a, b)
#define VECTOR 0x8000
#define ERROR  0x8004
#define EIP    0x8008
#define ECS    0x800c
#define GO_ON  0x8010

.macro FAULT vector, error, line, code:vararg
        mov     dword ptr [VECTOR], 0xdead
        mov     dword ptr [GO_ON], offset .Lfix\@
.Lat\@: \code
        mov     ecx, \line
        jmp     fail_at
.Lfix\@:
        WANT    "dword ptr [0x8000]", \vector, \line
        WANT    "dword ptr [0x8004]", \error, \line
        WANT    "dword ptr [0x8008]", "offset .Lat\@", \line
.endm
#define FAULTS(vector, error, code...) FAULT vector, error, __LINE__, code

main:
        mov     esp, 0x90000
        lgdt    [gdt_pointer]
        .byte   0xea
        .long   reload
        .word   0x08
reload: mov     eax, 0x10
        mov     ds, eax
        mov     es, eax
        mov     fs, eax
        mov     gs, eax
        mov     ss, eax
        // The IDT: all vectors go to stubs of 16 bytes.
        mov     edi, 0x9000
        mov     eax, offset stubs
        mov     ecx, 32
1:      mov     [edi], ax
        mov     word ptr [edi + 2], 0x08
        mov     word ptr [edi + 4], 0x8e00
        mov     edx, eax
        shr     edx, 16
        mov     [edi + 6], dx
        add     eax, 16
        add     edi, 8
        dec     ecx
        jnz     1b
        lidt    [idt_pointer]
        // A segment of 4096 bytes: inside, at the end, over it.
        mov     eax, 0x18
        mov     es, eax
        mov     eax, es:[0xffc]
        FAULTS(13, 0, mov eax, es:[0xffd])
        FAULTS(13, 0, mov byte ptr es:[0x1000], 1)
        // Read-only data can't be written, code can't be written at all.
        mov     eax, 0x20
        mov     es, eax
        mov     eax, es:[0x100]
        FAULTS(13, 0, mov es:[0x100], eax)
        FAULTS(13, 0, mov cs:[0x100], eax)
        // An expand-down segment: only beyond its limit.
        mov     eax, 0x28
        mov     es, eax
        mov     eax, es:[0x1000]
        FAULTS(13, 0, mov eax, es:[0xfff])
        // The null selector.
        xor     eax, eax
        mov     es, eax
        FAULTS(13, 0, mov eax, es:[0])
        // Not present; not a data segment; a stack that can't be written.
        mov     eax, 0x30
        FAULTS(11, 0x30, mov es, eax)
        mov     eax, 0x38
        FAULTS(13, 0x38, mov es, eax)
        mov     eax, 0x20
        FAULTS(13, 0x20, mov ss, eax)
        mov     eax, 0x10
        mov     es, eax
        // Bound and overflow.
        mov     dword ptr [0x8100], 1
        mov     dword ptr [0x8104], 5
        mov     eax, 9
        FAULTS(5, 0, bound eax, [0x8100])
        // LAR, LSL, VERR, VERW, ARPL.
        mov     eax, 0x18
        lsl     ebx, eax
        CHECK(ebx, 0xfff)
        lar     ebx, eax
        CHECK(ebx, 0x409300)
        mov     eax, 0x20
        verw    ax
        mov     ecx, __LINE__
        jz      fail_at
        verr    ax
        mov     ecx, __LINE__
        jnz     fail_at
        // To ring 3 and back by a call gate, on the stack of the TSS.
        mov     eax, 0x58
        ltr     ax
        push    0x4b                    // SS
        push    0x80000
        push    0x43                    // CS
        push    offset user
        retf
user:   mov     ax, cs
        and     eax, 3
        CHECK(eax, 3)
        mov     eax, 0x4b
        mov     ds, eax
        FAULTS(13, 0, cli)
        push    0x1234
        .byte   0x9a                    // call 0x50:0, the gate
        .long   0
        .word   0x53
        CHECK(ebx, 0x1234)
        CHECK(edx, 0x43)
        int     3                       // its gate is one of ring 0: #GP with the vector
back:   hlt
gate:   mov     eax, 0x10
        mov     ds, eax
        mov     ebx, [esp + 8]          // the parameter was copied over
        mov     edx, [esp + 4]
        lea     ecx, [esp]
        cmp     ecx, 0x88000 - 20
        mov     ecx, __LINE__
        jne     fail_at
        mov     dword ptr [GO_ON], offset ring0
        mov     dword ptr [VECTOR], 0xdead
        retf    4

ring0:  // Came by the #GP of INT 3 out of ring 3, still on the ring-0 stack.
        CHECK(dword ptr [VECTOR], 13)
        CHECK(dword ptr [ERROR], 0x1a)
        mov     esp, 0x90000
        mov     eax, 0x10
        mov     ds, eax
        mov     es, eax
        mov     ss, eax
        // Two-level paging: 4 MiB pages, the second shows the first.
        mov     edi, 0x20000
        mov     dword ptr [edi], 0x83
        mov     dword ptr [edi + 4], 0x83
        mov     dword ptr [edi + 8], 0x21003    // and a table
        mov     dword ptr [0x21000], 0x5003
        mov     dword ptr [0x21004], 0x5001     // read-only
        mov     eax, cr4
        or      eax, 0x10
        mov     cr4, eax
        mov     cr3, edi
        mov     eax, cr0
        or      eax, 0x80010000
        mov     cr0, eax
        mov     dword ptr [0x405000], 0x11223344
        CHECK(dword ptr [0x5000], 0x11223344)
        CHECK(dword ptr [0x800000], 0x11223344)
        CHECK(dword ptr [0x801000], 0x11223344)
        FAULTS(14, 3, mov dword ptr [0x801004], 1)
        mov     eax, cr2
        CHECK(eax, 0x801004)
        FAULTS(14, 0, mov eax, [0x802008])
        // Accessed and dirty bits.
        mov     eax, [0x21000]
        and     eax, 0x60
        CHECK(eax, 0x20)                // read only so far
        mov     dword ptr [0x800000], 1
        mov     eax, [0x21000]
        and     eax, 0x60
        CHECK(eax, 0x60)
        xor     eax, eax
        out     EXIT, eax
2:      hlt
        jmp     2b

.balign 16
stubs:
.set n, 0
.rept 32
.balign 16
        .if (n != 8) && (n != 10) && (n != 11) && (n != 12) && (n != 13) && (n != 14) && (n != 17)
        push    0
        .endif
        push    n
        jmp     common
.set n, n + 1
.endr
common: push    eax
        push    ds
        mov     eax, 0x10
        mov     ds, eax
        mov     eax, [esp + 8]
        mov     [VECTOR], eax
        mov     eax, [esp + 12]
        mov     [ERROR], eax
        mov     eax, [esp + 16]
        mov     [EIP], eax
        mov     eax, [esp + 20]
        mov     [ECS], eax
        cmp     dword ptr [GO_ON], 0
        jne     3f
        mov     eax, [EIP]
        out     DETAIL, eax
        xor     eax, eax
        out     DETAIL, eax
        mov     eax, [ERROR]
        out     DETAIL, eax
        mov     ecx, [VECTOR]
        add     ecx, 100000
        jmp     fail_at
3:      mov     eax, [GO_ON]
        mov     dword ptr [GO_ON], 0
        cmp     eax, offset ring0
        je      ring0
        mov     [esp + 16], eax
        pop     ds
        pop     eax
        add     esp, 8
        iretd

.balign 8
gdt:    .quad   0
        .quad   0x00cf9b000000ffff      // 0x08: code
        .quad   0x00cf93000000ffff      // 0x10: data
        .quad   0x0040930000000fff      // 0x18: data, 4096 bytes
        .quad   0x00cf91000000ffff      // 0x20: data, read-only
        .quad   0x0040970000000fff      // 0x28: data, expand-down
        .quad   0x00cf13000000ffff      // 0x30: not present
        .quad   0x00cf99000000ffff      // 0x38: code, execute-only
        .quad   0x00cffb000000ffff      // 0x40: user code
        .quad   0x00cff3000000ffff      // 0x48: user data
        .word   gate - image, 0x08, 0xec01, 0x0010      // 0x50: call gate for all, one parameter
        .word   0x67, (tss - image), 0x8910, 0          // 0x58: TSS at 1 MiB + tss
gdt_pointer:
        .word   12 * 8 - 1
        .long   gdt
idt_pointer:
        .word   32 * 8 - 1
        .long   0x9000
.balign 8
tss:    .long   0, 0x88000, 0x10
        .fill   22, 4, 0
        .word   0, 0x68
