// Device memory through each kind of instruction.
#include "long.h"
.macro ZERO
        xor     eax, eax
        mov     [rbx], rax
        mov     [rbx + 8], rax
.endm
main:
        SETUP
        mov     ebx, DEVICE
        // Moves of each size, both ways.
        mov     rax, 0x8877665544332211
        mov     [rbx], rax
        mov     rcx, [rbx]
        CHECK(rcx, 0x8877665544332211)
        mov     ecx, [rbx + 4]
        CHECK(rcx, 0x88776655)
        xor     ecx, ecx
        mov     cx, [rbx + 2]
        CHECK(rcx, 0x4433)
        xor     ecx, ecx
        mov     cl, [rbx + 7]
        CHECK(rcx, 0x88)
        mov     ch, [rbx + 1]
        CHECK(rcx, 0x2288)
        mov     dword ptr [rbx + 8], 0x01020304
        mov     word ptr [rbx + 12], 0x0506
        mov     byte ptr [rbx + 14], 0x07
        mov     rcx, [rbx + 8]
        CHECK(rcx, 0x0007050601020304)
        mov     qword ptr [rbx + 8], -2
        mov     rcx, [rbx + 8]
        CHECK(rcx, 0xfffffffffffffffe)
        // Extensions.
        movzx   ecx, byte ptr [rbx + 7]
        CHECK(rcx, 0x88)
        movzx   ecx, word ptr [rbx + 6]
        CHECK(rcx, 0x8877)
        movsx   rcx, byte ptr [rbx + 7]
        CHECK(rcx, 0xffffffffffffff88)
        movsx   ecx, word ptr [rbx + 6]
        CHECK(rcx, 0xffff8877)
        movsxd  rcx, dword ptr [rbx + 4]
        CHECK(rcx, 0xffffffff88776655)
        // Read, modify, write.
        ZERO
        mov     ecx, 5
        add     [rbx], ecx
        add     dword ptr [rbx], 7
        sub     byte ptr [rbx], 1
        CHECK32([rbx], 11)
        or      dword ptr [rbx], 0x100
        and     word ptr [rbx], 0x10a
        xor     byte ptr [rbx], 0xff
        CHECK32([rbx], 0x1f5)
        inc     dword ptr [rbx]
        neg     dword ptr [rbx]
        not     dword ptr [rbx]
        CHECK32([rbx], 0x1f5)
        shl     dword ptr [rbx], 4
        CHECK32([rbx], 0x1f50)
        bts     dword ptr [rbx], 31
        setc    cl
        CHECK32([rbx], 0x80001f50)
        // Reads with an operation: flags from memory.
        mov     dword ptr [rbx], 7
        cmp     dword ptr [rbx], 7
        sete    cl
        movzx   ecx, cl
        CHECK(rcx, 1)
        test    dword ptr [rbx], 8
        setz    cl
        movzx   ecx, cl
        CHECK(rcx, 1)
        mov     ecx, 100
        sub     ecx, [rbx]
        CHECK(rcx, 93)
        imul    ecx, [rbx]
        CHECK(rcx, 651)
        // Exchanges.
        mov     ecx, 0x1234
        xchg    [rbx], ecx
        CHECK(rcx, 7)
        CHECK32([rbx], 0x1234)
        lock xadd [rbx], ecx
        CHECK(rcx, 0x1234)
        CHECK32([rbx], 0x123b)
        mov     eax, 0x123b
        mov     ecx, 0x55
        lock cmpxchg [rbx], ecx
        CHECK32([rbx], 0x55)
        // Push from and pop to.
        push    qword ptr [rbx]
        pop     rcx
        CHECK(rcx, 0x55)
        push    0x66
        pop     qword ptr [rbx]
        CHECK32([rbx], 0x66)
        // Strings.
        cld
        mov     qword ptr [0x200000], 0x11111111
        mov     qword ptr [0x200008], 0x22222222
        mov     esi, 0x200000
        mov     rdi, rbx
        mov     ecx, 4
        rep movsd
        mov     rcx, [rbx + 8]
        CHECK(rcx, 0x22222222)
        mov     rsi, rbx
        mov     edi, 0x200100
        mov     ecx, 16
        rep movsb
        CHECK([0x200100], 0x11111111)
        CHECK([0x200108], 0x22222222)
        mov     rdi, rbx
        mov     eax, 0x5a
        mov     ecx, 3
        rep stosb
        CHECK32([rbx], 0x115a5a5a)
        mov     rsi, rbx
        lodsw
        CHECK32(eax, 0x5a5a)
        // Across a register's end (unaligned).
        mov     dword ptr [rbx + 6], 0x0a0b0c0d
        CHECK32([rbx + 6], 0x0a0b0c0d)
        mov     rcx, [rbx + 3]
        // SSE, in ring 3.
        IN_RING3 sse
        FINISH

sse:    mov     rdi, 0x0123456789abcdef
        mov     rax, rdi
        movq    xmm0, rax
        pshufd  xmm0, xmm0, 0x44
        movups  [rbx + 16], xmm0
        mov     rcx, [rbx + 24]
        cmp     rcx, rdi
        jne     bad
        movdqu  xmm1, [rbx + 16]
        movq    rcx, xmm1
        cmp     rcx, rdi
        jne     bad
        movaps  [rbx + 32], xmm1
        movaps  xmm2, [rbx + 32]
        psrldq  xmm2, 8
        movq    rcx, xmm2
        cmp     rcx, rdi
        jne     bad
        hlt
bad:    mov     rbx, rcx
        mov     rax, rdi
        mov     ecx, __LINE__
        jmp     failed
