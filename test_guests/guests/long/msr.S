// Model-specific registers: what is written is read back; what can't be raises #GP.
#include "long.h"
.macro KEEPS msr, value
        mov     ecx, \msr
        rdmsr
        mov     r8d, eax
        mov     r9d, edx
        mov     rax, \value
        mov     rdx, rax
        shr     rdx, 32
        wrmsr
        xor     eax, eax
        xor     edx, edx
        rdmsr
        shl     rdx, 32
        or      rax, rdx
        CHECK(rax, \value)
        mov     eax, r8d
        mov     edx, r9d
        wrmsr
.endm
.macro REFUSES msr, value
        mov     ecx, \msr
        mov     rbx, \value
        mov     rdx, rbx
        shr     rdx, 32
        lea     rax, [rip + .Lafter\@]
        mov     [FIXUP], rax
        mov     qword ptr [R_VECTOR], 0
        mov     eax, ebx
        wrmsr
        mov     ebx, \msr
        mov     ecx, 1000
        jmp     failed
.Lafter\@:
        CHECK([R_VECTOR], 13)
        CHECK([R_ERROR], 0)
.endm
main:
        SETUP
        KEEPS   0xc0000081, 0x0023001000000000
        KEEPS   0xc0000082, 0xffffffff81000000
        KEEPS   0xc0000083, 0xffff800000001000
        KEEPS   0xc0000084, 0x257fd5
        KEEPS   0xc0000100, 0x00007fff12345000
        KEEPS   0xc0000101, 0xffff888000000000
        KEEPS   0xc0000102, 0xffffc90000000000
        KEEPS   0x174, 0x10
        KEEPS   0x175, 0xfffffe0000003000
        KEEPS   0x176, 0xffffffff81000040
        KEEPS   0x277, 0x0407050600070106
        // The bases of FS and GS are those of the segments.
        mov     ecx, 0xc0000100
        mov     eax, 0x200000
        xor     edx, edx
        wrmsr
        mov     dword ptr [0x200008], 0x1234
        mov     eax, fs:[8]
        CHECK32(eax, 0x1234)
        // SWAPGS.
        mov     ecx, 0xc0000102
        mov     eax, 0x210000
        wrmsr
        mov     dword ptr [0x210000], 0x5678
        swapgs
        mov     eax, gs:[0]
        CHECK32(eax, 0x5678)
        swapgs
        // The time stamp counter goes up.
        rdtsc
        shl     rdx, 32
        or      rax, rdx
        mov     r8, rax
        mov     ecx, 0x10
        rdmsr
        shl     rdx, 32
        or      rax, rdx
        cmp     rax, r8
        seta    al
        movzx   eax, al
        CHECK(rax, 1)
        // RDTSCP gives TSC_AUX.
        mov     eax, 0x80000001
        cpuid
        bt      edx, 27
        jnc     1f
        mov     ecx, 0xc0000103
        mov     eax, 0x77
        xor     edx, edx
        wrmsr
        rdtscp
        CHECK32(ecx, 0x77)
1:
        // Addresses that are not canonical, reserved bits, MSRs that there are not.
        REFUSES 0xc0000082, 0x8000000000000000
        REFUSES 0xc0000100, 0x4000000000000000
        REFUSES 0xc0000102, 0xbfff800000000000
        REFUSES 0xc0000080, 0x100000000
        REFUSES 0x1b, 0xffffffffffffffff
        mov     ecx, 0x12345678
        FAULTS(13, 0, rdmsr)
        // Leaving long mode by EFER while paging is on.
        mov     ecx, 0xc0000080
        rdmsr
        and     eax, ~0x100
        mov     ebx, eax
        lea     rax, [rip + 2f]
        mov     [FIXUP], rax
        mov     qword ptr [R_VECTOR], 0
        mov     eax, ebx
        wrmsr
2:      CHECK([R_VECTOR], 13)
        // EFER reads back LMA.
        rdmsr
        and     eax, 0x500
        CHECK32(eax, 0x500)
        // In ring 3 both are #GP.
        IN_RING3 user
        CHECK([R_VECTOR], 13)
        FINISH
user:   mov     ecx, 0x10
        mov     qword ptr [R_VECTOR], 0
        lea     rax, [rip + 1f]
        mov     [FIXUP], rax
        rdmsr
1:      hlt
