// The paravirtual clock, where CPUID has it.
#include "long.h"
#define PAGE 0x200000
#define WALL 0x201000
main:
        SETUP
        mov     eax, 0x40000000
        cpuid
        cmp     ebx, 0x4b4d564b                 // "KVMK"
        jne     none
        mov     eax, 0x40000001
        cpuid
        bt      eax, 3
        jnc     none
        mov     ecx, 0x4b564d00                 // wall clock
        mov     eax, WALL
        xor     edx, edx
        wrmsr
        mov     eax, [WALL + 4]                 // seconds at boot: after 2020
        cmp     eax, 1577836800
        seta    al
        movzx   eax, al
        CHECK(rax, 1)
        mov     ecx, 0x4b564d01
        mov     eax, PAGE | 1
        xor     edx, edx
        wrmsr
        mov     eax, [PAGE]                     // the version is even, and a multiplier is there
        and     eax, 1
        CHECK32(eax, 0)
        mov     eax, [PAGE + 24]
        test    eax, eax
        setnz   al
        movzx   eax, al
        CHECK(rax, 1)
        call    now
        mov     r14, rax
        mov     r15d, 20
1:      call    now
        cmp     rax, r14
        setae   cl
        movzx   ecx, cl
        CHECK(rcx, 1)
        mov     r14, rax
        dec     r15d
        jnz     1b
        // Less than a minute has passed since the machine was made.
        mov     rcx, 60000000000
        cmp     r14, rcx
        setb    cl
        movzx   ecx, cl
        CHECK(rcx, 1)
        // The host stands still for a second of its own time, in which the guest's must not go on.
        mov     eax, 1
        out     COMMAND, eax
        call    now
        sub     rax, r14
        mov     rcx, 900000000
        cmp     rax, rcx
        setb    cl
        movzx   ecx, cl
        CHECK(rcx, 1)
none:   FINISH

// RAX: nanoseconds by the clock's page. Changes RCX, RDX, R8 to R11.
now:    mov     r11d, [PAGE]
        test    r11d, 1
        jnz     now
        lfence
        rdtsc
        shl     rdx, 32
        or      rax, rdx
        sub     rax, [PAGE + 8]
        movsx   ecx, byte ptr [PAGE + 28]
        test    ecx, ecx
        js      1f
        shl     rax, cl
        jmp     2f
1:      neg     ecx
        shr     rax, cl
2:      mov     r10d, [PAGE + 24]
        mul     r10
        shrd    rax, rdx, 32
        add     rax, [PAGE + 16]
        lfence
        cmp     r11d, [PAGE]
        jne     now
        ret
