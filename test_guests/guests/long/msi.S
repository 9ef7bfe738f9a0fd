// Interrupts by message: delivered, held back by IF, by priority and by TPR, and out of HLT.
#include "long.h"
#define SEND_41   1     // the host sends vector 0x41 now
#define LATER_42  2     // the host sends vector 0x42 in a few milliseconds
#define SEND_51_61 3    // both now
#define SEND_71   4
#define SEND_51   5
#define SEND_61   6
main:
        SETUP
        APIC_ON
        // Held back while IF is clear, then delivered.
        mov     eax, SEND_41
        out     COMMAND, eax
        mov     ecx, 200
1:      pause
        dec     ecx
        jnz     1b
        CHECK32([COUNTS + 0x41 * 4], 0)
        mov     eax, [rsi + 0x220]      // IRR, vectors 0x40 to 0x5f
        CHECK32(eax, 2)
        sti
5:      pause
        cmp     dword ptr [COUNTS + 0x41 * 4], 1
        jne     5b
        mov     eax, [rsi + 0x220]
        CHECK32(eax, 0)
        // Delivered while running.
        sti
        mov     eax, SEND_41
        out     COMMAND, eax
2:      pause
        cmp     dword ptr [COUNTS + 0x41 * 4], 2
        jne     2b
        // Out of HLT, ten times; STI's shadow keeps the interrupt from coming before HLT.
        mov     r15d, 10
3:      cli
        mov     eax, LATER_42
        out     COMMAND, eax
        sti
        hlt
        dec     r15d
        jnz     3b
        CHECK32([COUNTS + 0x42 * 4], 10)
        // The higher priority first.
        cli
        lea     rax, [rip + order]
        mov     [IHOOK], rax
        mov     eax, SEND_51_61
        out     COMMAND, eax
        xor     r14d, r14d
        sti
        nop
        nop
        nop
4:      pause
        cmp     dword ptr [COUNTS + 0x51 * 4], 1
        jne     4b
        CHECK(r14, 0x6151)
        // TPR holds 0x51 and 0x61 back, not 0x71.
        mov     dword ptr [rsi + 0x80], 0x60
        mov     rax, cr8
        CHECK(rax, 6)
        mov     eax, SEND_51_61
        out     COMMAND, eax
        mov     eax, SEND_71
        out     COMMAND, eax
5:      pause
        cmp     dword ptr [COUNTS + 0x71 * 4], 1
        jne     5b
        CHECK32([COUNTS + 0x51 * 4], 1)
        CHECK32([COUNTS + 0x61 * 4], 1)
        xor     r14d, r14d
        xor     eax, eax
        mov     cr8, rax
        nop
6:      pause
        cmp     dword ptr [COUNTS + 0x51 * 4], 2
        jne     6b
        CHECK(r14, 0x6151)
        // While one is in service, a lower one waits for its end even with IF set, a higher one does not.
        lea     rax, [rip + nested]
        mov     [IHOOK], rax
        xor     r13d, r13d
        mov     eax, SEND_61
        out     COMMAND, eax
7:      pause
        cmp     dword ptr [COUNTS + 0x51 * 4], 3
        jne     7b
        CHECK(r13, 1)
        FINISH
nested: cmp     eax, 0x61
        jne     2f
        mov     eax, SEND_51
        out     COMMAND, eax
        mov     eax, SEND_71
        out     COMMAND, eax
        sti
1:      pause
        cmp     dword ptr [COUNTS + 0x71 * 4], 2
        jne     1b
        cli
        cmp     dword ptr [COUNTS + 0x51 * 4], 2
        sete    r13b
2:      ret
order:  shl     r14, 8
        or      r14, rax
        ret
