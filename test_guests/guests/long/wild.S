// Runs what the host has put at 0x200000 (1 MiB) piece by piece, each with registers from 0x280000 on, in ring 0 or, when 0x8200
// is 1, in ring 3; every exception leads to the next piece.
#include "long.h"
#define RING   0x8200
#define INDEX  0x8204
#define PIECES 600
main:
        mov     dword ptr [INDEX], 0
next:   mov     rsp, STACK
        cld
        lidt    [rip + idt_pointer]
        lea     rax, [rip + next]
        mov     [HOOK], rax
        mov     [RETURN], rax
        mov     qword ptr [SAVED_RSP], STACK
        mov     qword ptr [F_LINE], 0
        mov     ebx, [INDEX]
        inc     dword ptr [INDEX]
        cmp     ebx, PIECES
        jae     over
        mov     r15d, ebx
        shl     ebx, 7
        add     ebx, 0x280000
        imul    r15d, r15d, 333
        add     r15d, 0x200000
        mov     [0x8208], r15
        cmp     dword ptr [RING], 1
        je      user
        push    [0x8208]
        jmp     load
user:   push    UDATA
        push    USER_STACK
        push    0x3002
        push    UCODE
        push    [0x8208]
load:   mov     rax, [rbx]
        mov     rcx, [rbx + 8]
        mov     rdx, [rbx + 16]
        mov     rsi, [rbx + 24]
        mov     rdi, [rbx + 32]
        mov     rbp, [rbx + 40]
        mov     r8, [rbx + 48]
        mov     r9, [rbx + 56]
        mov     r10, [rbx + 64]
        mov     r11, [rbx + 72]
        mov     r12, [rbx + 80]
        mov     r13, [rbx + 88]
        mov     r14, [rbx + 96]
        mov     r15, [rbx + 104]
        mov     rbx, [rbx + 112]
        cmp     dword ptr [RING], 1
        je      leave_ring0
        ret
leave_ring0:
        iretq
over:   FINISH
