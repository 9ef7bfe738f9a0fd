// Reads and writes ports all over, in each size, but for those that end the test.
#include "long.h"
main:
        SETUP
        mov     r15d, 0x1234567
        xor     ebx, ebx
1:      add     ebx, 37
        cmp     ebx, 0x10000
        jae     2f
        mov     eax, ebx
        and     eax, 0xfff0
        cmp     eax, 0xe0
        je      1b
        cmp     eax, 0xf0
        je      1b
        imul    r15d, r15d, 1103515245
        add     r15d, 12345
        mov     edx, ebx
        mov     eax, r15d
        out     dx, al
        out     dx, ax
        out     dx, eax
        in      al, dx
        in      ax, dx
        in      eax, dx
        jmp     1b
        // At the end of the port space.
2:      mov     edx, 0xffff
        out     dx, eax
        in      eax, dx
        // Device space all over the fourth GiB, and accesses over the end of the board's registers.
        mov     ecx, 400
3:      imul    r15d, r15d, 1103515245
        add     r15d, 12345
        mov     eax, r15d
        or      eax, 0xc0000000
        mov     edx, eax
        and     edx, 0xfff00000
        cmp     edx, APIC
        je      4f
        mov     [rax], r15
        mov     rdx, [rax]
        mov     [rax + 3], r15w
        xchg    [rax], r15b
4:      dec     ecx
        jnz     3b
        mov     eax, DEVICE + 0xfffc
        mov     rdx, [rax]
        mov     [rax], rdx
        FINISH
