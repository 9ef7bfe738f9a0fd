// SYSCALL and SYSRET, 64 bits and compatibility mode, and IRET to it.
#include "long.h"
main:
        SETUP
        mov     ecx, 0xc0000081
        xor     eax, eax
        mov     edx, 0x00180008                 // SYSRET base 0x18, SYSCALL base 0x08
        wrmsr
        mov     ecx, 0xc0000082
        lea     rax, [rip + entry64]
        xor     edx, edx
        wrmsr
        mov     ecx, 0xc0000083
        lea     rax, [rip + entry32]
        xor     edx, edx
        wrmsr
        mov     ecx, 0xc0000084
        mov     eax, 0x400                      // clears DF
        xor     edx, edx
        wrmsr
        IN_RING3 user
        CHECK(r12, 3)
        // Compatibility mode in ring 3.
        xor     r12d, r12d
        lea     rax, [rip + 1f]
        mov     [RETURN], rax
        mov     [SAVED_RSP], rsp
        push    UDATA
        push    USER_STACK
        push    0x3202
        push    UCODE32
        lea     rax, [rip + compat]
        push    rax
        iretq
1:      CHECK32([0x200000], 0x11223344)
        CHECK32([0x200004], 4)
        FINISH
user:   std
        mov     r12d, 0
        mov     r13, rsp
uloop:  syscall
        pushfq
        pop     rax
        bt      eax, 10                         // DF is back
        jnc     bad
        cmp     rsp, r13
        jne     bad
        cmp     r12d, 3
        jne     uloop
        cld
        hlt
bad:    mov     ecx, __LINE__
        mov     ebx, eax
        jmp     failed
// RCX: where it came from, R11: its flags.
entry64:
        inc     r12d
        pushfq
        pop     rax
        bt      eax, 10
        jc      bad
        lea     rax, [rip + uloop + 2]
        cmp     rcx, rax
        jne     bad
        sysretq
entry32:
        ud2
.code32
compat: mov     eax, UDATA              // IRET has taken the kernel's away
        mov     ds, eax
        mov     eax, 0x11223344
        mov     edx, 0x200000
        mov     [edx], eax
        .byte   0x40                            // INC EAX here, a prefix in 64-bit mode
        push    eax
        mov     [edx + 4], esp
        sub     dword ptr [edx + 4], USER_STACK
        neg     dword ptr [edx + 4]
        hlt
.code64
