// Instructions that only these modes have, or that interpreters tend to leave out.
#include "ports.h"
.intel_syntax noprefix
.code16
.text
image:
        xor     ax, ax
        mov     ss, ax
        mov     ds, ax
        mov     sp, 0x7000
        mov     bx, 1
        mov     ax, 0x0009
        add     al, 8
        aaa
        cmp     ax, 0x0107
        jne     bad
        inc     bx
        mov     ax, 0x0203
        sub     al, 5
        aas
        cmp     ax, 0x0108
        jne     bad
        inc     bx
        mov     al, 0x38
        add     al, 0x45
        daa
        cmp     al, 0x83
        jne     bad
        inc     bx
        mov     al, 0x83
        sub     al, 0x45
        das
        cmp     al, 0x38
        jne     bad
        inc     bx
        mov     al, 63
        aam
        cmp     ax, 0x0603
        jne     bad
        inc     bx
        aad
        cmp     ax, 63
        jne     bad
        // PUSHA and POPA.
        inc     bx
        mov     cx, 0x1234
        mov     dx, 0x5678
        pusha
        xor     cx, cx
        xor     dx, dx
        popa
        cmp     cx, 0x1234
        jne     bad
        cmp     dx, 0x5678
        jne     bad
        // BOUND inside its limits; XLAT.
        inc     bx
        mov     word ptr [0x8000], 5
        mov     word ptr [0x8002], 9
        mov     ax, 7
        bound   ax, [0x8000]
        mov     byte ptr [0x8013], 0x5c
        push    bx
        mov     bx, 0x8010
        mov     al, 3
        xlatb
        pop     bx
        cmp     al, 0x5c
        jne     bad
        // Load far pointers; ENTER and LEAVE.
        inc     bx
        mov     word ptr [0x8004], 0x1111
        mov     word ptr [0x8006], 0x2222
        les     di, [0x8004]
        cmp     di, 0x1111
        jne     bad
        mov     ax, es
        cmp     ax, 0x2222
        jne     bad
        inc     bx
        mov     bp, 0x4444
        enter   8, 0
        cmp     bp, 0x6ffe
        jne     bad
        cmp     sp, 0x6ff6
        jne     bad
        leave
        cmp     bp, 0x4444
        jne     bad
        // The breakpoint by the table at 0, and INTO.
        inc     bx
        mov     word ptr [3 * 4], offset count
        mov     word ptr [3 * 4 + 2], 0
        mov     word ptr [4 * 4], offset count
        mov     word ptr [4 * 4 + 2], 0
        xor     si, si
        int3
        mov     al, 0x7f
        inc     al
        into
        cmp     si, 2
        jne     bad
        mov     al, 0
        out     EXIT, al
        jmp     stop
bad:    movzx   eax, bx
        out     FAIL, eax
stop:   hlt
        jmp     stop
count:  inc     si
        iret
