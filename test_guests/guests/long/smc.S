// Code that changes: the next instruction, a function called in a loop, through another address of the same page, and by a
// string instruction.
#include "long.h"
main:
        SETUP
        // A function whose result is patched a thousand times, in ring 3.
        IN_RING3 loop_patch
        CHECK(rbx, 499500)
        // The instruction just ahead.
        mov     byte ptr [rip + ahead + 1], 0x5a
        jmp     ahead
ahead:  mov     al, 0
        movzx   eax, al
        CHECK32(eax, 0x5a)
        // Without even a jump between.
        mov     byte ptr [rip + next + 1], 0x66
next:   mov     al, 0
        movzx   eax, al
        CHECK32(eax, 0x66)
        // Code written by a string instruction, over a page's border, and replaced.
        lea     rsi, [rip + first]
        mov     edi, 0x200ffd
        mov     ecx, 6
        rep movsb
        mov     ecx, 0x200ffd
        call    rcx
        CHECK32(eax, 0x11223344)
        lea     rsi, [rip + second]
        mov     edi, 0x200ffd
        mov     ecx, 6
        rep movsb
        mov     ecx, 0x200ffd
        call    rcx
        CHECK32(eax, 0x55667788)
        // Through another mapping of the same memory (the second GiB shows the first MiBs).
        mov     rax, [0x2000]
        mov     [0x2008], rax
        mov     rax, cr3
        mov     cr3, rax
        mov     ebx, 0x40200ffd
        mov     dword ptr [rbx + 1], 0x99
        mov     ecx, 0x200ffd
        call    rcx
        CHECK32(eax, 0x99)
        FINISH
first:  mov     eax, 0x11223344
        ret
second: mov     eax, 0x55667788
        ret
loop_patch:
        xor     ebx, ebx
        xor     ecx, ecx
1:      mov     [rip + patched + 1], ecx
        call    patched
        add     rbx, rax
        inc     ecx
        cmp     ecx, 1000
        jne     1b
        hlt
patched:
        mov     eax, 0
        ret
