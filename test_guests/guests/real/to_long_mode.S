// From real mode to protected mode, compatibility mode and 64-bit mode, and all the way back.
#include "ports.h"
.intel_syntax noprefix
.code16
.text
image:
        cli
        xor     ax, ax
        mov     ds, ax
        mov     ss, ax
        mov     sp, 0x7000
        lgdt    [gdt_pointer]
        mov     eax, cr0
        or      al, 1
        mov     cr0, eax
        .byte   0x66, 0xea              // jmp 0x08:protected
        .long   protected
        .word   0x08
.code32
protected:
        mov     ax, 0x10
        mov     ds, eax
        mov     es, eax
        mov     ss, eax
        mov     esp, 0x7000
        mov     ecx, 1
        // 32-bit addresses reach beyond the first MiB.
        mov     dword ptr [0x180000], 0x12345678
        cmp     word ptr [0x180002], 0x1234
        jne     bad
        push    0x11223344
        pop     eax
        cmp     eax, 0x11223344
        jne     bad
        // Tables: one of each level, 2 MiB pages.
        mov     dword ptr [0x11000], 0x12003
        mov     dword ptr [0x12000], 0x13003
        mov     dword ptr [0x13000], 0x83
        mov     eax, cr4
        or      eax, 0x20
        mov     cr4, eax
        mov     eax, 0x11000
        mov     cr3, eax
        mov     ecx, 0xc0000080
        rdmsr
        or      eax, 0x100
        wrmsr
        mov     eax, cr0
        or      eax, 0x80000000
        mov     cr0, eax
        // Compatibility mode now: long mode is active, the code is 32 bits wide.
        rdmsr
        test    eax, 0x400
        mov     ecx, 2
        jz      bad
        .byte   0xea                    // jmp 0x18:long
        .long   long_code
        .word   0x18
.code64
long_code:
        mov     rax, 0x123456789abcdef0
        mov     r15, rax
        lea     rbx, [rip + long_code]
        cmp     rbx, offset long_code
        mov     ecx, 3
        jne     bad64
        shr     r15, 32
        cmp     r15d, 0x12345678
        jne     bad64
        // Back: to compatibility mode by a far return, then out of paging, long mode, protection.
        push    0x08
        push    offset compatible
        retfq
bad64:  mov     eax, ecx
        out     FAIL, eax
1:      hlt
        jmp     1b
.code32
compatible:
        mov     ecx, 4
        mov     eax, cr0
        and     eax, 0x7fffffff
        mov     cr0, eax
        mov     ecx, 0xc0000080
        rdmsr
        test    eax, 0x400
        jnz     bad
        and     eax, ~0x100
        wrmsr
        .byte   0xea                    // jmp 0x20:sixteen
        .long   sixteen
        .word   0x20
.code16
sixteen:
        mov     ax, 0x28
        mov     ds, ax
        mov     ss, ax
        mov     eax, cr0
        and     al, 0xfe
        mov     cr0, eax
        .byte   0xea                    // jmp 0:real
        .word   real
        .word   0
real:
        xor     ax, ax
        mov     ds, ax
        mov     ss, ax
        mov     word ptr [0x7ff0], 0x55aa
        cmp     word ptr [0x7ff0], 0x55aa
        mov     cx, 5
        jne     bad16
        mov     al, 0
        out     EXIT, al
        jmp     stop
bad16:  movzx   eax, cx
        out     FAIL, eax
stop:   hlt
        jmp     stop
.code32
bad:    mov     eax, ecx
        out     FAIL, eax
1:      hlt
        jmp     1b

.balign 8
gdt:    .quad   0
        .quad   0x00cf9b000000ffff      // 0x08: 32-bit code
        .quad   0x00cf93000000ffff      // 0x10: data
        .quad   0x00af9b000000ffff      // 0x18: 64-bit code
        .quad   0x00009b000000ffff      // 0x20: 16-bit code
        .quad   0x000093000000ffff      // 0x28: 16-bit data
gdt_pointer:
        .word   6 * 8 - 1
        .long   gdt
