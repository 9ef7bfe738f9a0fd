// Port I/O of every size and form, string instructions with and without repeat, up and down.
#include "long.h"
main:
        SETUP
        // Sizes, by DX.
        mov     edx, SCRATCH
        mov     eax, 0x11223344
        out     dx, eax
        mov     ax, 0x5566
        add     edx, 4
        out     dx, ax
        mov     al, 0x77
        add     edx, 2
        out     dx, al
        mov     edx, SCRATCH
        mov     rax, -1
        in      eax, dx                 // clears the upper half
        CHECK(rax, 0x11223344)
        mov     rax, -1
        add     edx, 4
        in      ax, dx                  // keeps it
        CHECK(rax, 0xffffffffffff5566)
        mov     rax, -1
        add     edx, 2
        in      al, dx
        CHECK(rax, 0xffffffffffffff77)
        // A read of the middle, unaligned.
        mov     edx, SCRATCH + 1
        in      eax, dx
        CHECK32(eax, 0x66112233)
        // String output: 5 bytes, 3 words, 2 doublewords.
        mov     edx, STREAM
        lea     rsi, [rip + data]
        mov     ecx, 5
        rep outsb
        CHECK(rcx, 0)
        lea     rax, [rip + data + 5]
        sub     rax, rsi
        CHECK(rax, 0)
        mov     ecx, 3
        rep outsw
        mov     ecx, 2
        rep outsd
        // Downwards.
        lea     rsi, [rip + data + 3]
        std
        mov     ecx, 4
        rep outsb
        cld
        // A count of zero does nothing.
        xor     ecx, ecx
        rep outsb
        // Single steps of the string instructions.
        lea     rsi, [rip + data]
        outsb
        outsw
        outsd
        // String input.
        mov     edi, 0x200000
        mov     ecx, 5
        rep insb
        mov     ecx, 2
        rep insw
        mov     ecx, 2
        rep insd
        CHECK(rdi, 0x200011)
        CHECK([0x200000], 0x0706050403020100)
        CHECK([0x200008], 0x0f0e0d0c0b0a0908)
        // Downwards: each word itself is the right way round.
        mov     edi, 0x200108
        std
        mov     ecx, 2
        rep insw
        cld
        CHECK32([0x200106], 0x12111413)
        // A long one, over a page's end.
        mov     edi, 0x201f00
        mov     ecx, 1024
        rep insb
        CHECK(rdi, 0x202300)
        // By immediate port number.
        mov     al, 0x42
        out     TEXT, al
        // A port that nobody has.
        mov     edx, 0x7777
        in      eax, dx
        CHECK32(eax, 0xffffffff)
        FINISH
data:   .ascii "0123456789abcdefghij"
