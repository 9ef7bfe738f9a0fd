// Real mode: segments, the interrupt table, string instructions, far calls, port I/O.
#include "ports.h"
.intel_syntax noprefix
.code16
.text
image:
        cli
        xor     ax, ax
        mov     ss, ax
        mov     sp, 0x7000
        mov     bx, 1
        // A segment's base is its selector times 16.
        mov     ax, 0x2000
        mov     ds, ax
        mov     word ptr ds:[0x10], 0x1234
        mov     ax, 0x2001
        mov     es, ax
        mov     ax, es:[0]
        cmp     ax, 0x1234
        jne     bad
        // Addresses wrap inside 16 bits of offset by registers.
        inc     bx
        mov     si, 0xfff0
        mov     word ptr ds:[0], 0x4711
        mov     ax, [si + 0x10]
        cmp     ax, 0x4711
        jne     bad
        // 32-bit operands and addresses below 64 KiB.
        inc     bx
        mov     eax, 0x12345678
        mov     edx, 0x20
        mov     ds:[edx], eax
        cmp     word ptr ds:[0x22], 0x1234
        jne     bad
        // Interrupts by the table at 0.
        inc     bx
        xor     ax, ax
        mov     ds, ax
        mov     word ptr ds:[0x40 * 4], offset handler
        mov     word ptr ds:[0x40 * 4 + 2], 0
        sti
        int     0x40
        pushf
        pop     ax
        cli
        test    ax, 0x200               // IRET has put IF back
        jz      bad
        cmp     cx, 0x4040
        jne     bad
        // A divide error comes back at the instruction, here made good.
        inc     bx
        mov     word ptr ds:[0], offset divide
        mov     word ptr ds:[2], 0
        mov     ax, 100
        xor     dl, dl
        div     dl
        cmp     al, 20
        jne     bad
        // Strings.
        inc     bx
        mov     ax, 0x3000
        mov     es, ax
        cld
        xor     di, di
        mov     al, 0x5a
        mov     cx, 0x100
        rep stosb
        cmp     byte ptr es:[0xff], 0x5a
        jne     bad
        cmp     byte ptr es:[0x100], 0
        jne     bad
        // Far call and return.
        inc     bx
        .byte   0x9a                    // call 0x0100:far - 0x1000
        .word   far_part - image
        .word   0x0100
        cmp     dx, 0x100
        jne     bad
        // Ports.
        inc     bx
        mov     dx, SCRATCH
        mov     eax, 0xcafebabe
        out     dx, eax
        in      ax, dx
        cmp     ax, 0xbabe
        jne     bad
        mov     dx, STREAM
        xor     di, di
        mov     cx, 4
        rep insw
        cmp     word ptr es:[6], 0x0706
        jne     bad
        // Loops.
        inc     bx
        mov     cx, 5
        xor     ax, ax
1:      add     ax, cx
        loop    1b
        cmp     ax, 15
        jne     bad
        mov     al, 0
        out     EXIT, al
        jmp     stop
bad:    movzx   eax, bx
        out     FAIL, eax
stop:   hlt
        jmp     stop

handler:
        mov     cx, 0x4040
        iret
divide:
        mov     dl, 5
        iret
far_part:
        mov     dx, cs
        retf
