// What only a processor that traps every such instruction can tell: memory types that there are not in the PAT, the
// selectors that SYSCALL loads.
#include "long.h"
main:
        SETUP
        mov     ecx, 0x277
        lea     rbx, [rip + 1f]
        mov     [FIXUP], rbx
        mov     eax, 2
        xor     edx, edx
        wrmsr
        mov     ecx, __LINE__
        jmp     failed
1:      CHECK([R_VECTOR], 13)
        mov     ecx, 0xc0000081
        xor     eax, eax
        mov     edx, 0x00180008
        wrmsr
        mov     ecx, 0xc0000082
        lea     rax, [rip + entry]
        xor     edx, edx
        wrmsr
        IN_RING3 user
user:   syscall
entry:  mov     ebx, ss
        CHECK(rbx, KDATA)
        mov     ebx, cs
        CHECK(rbx, KCODE)
        FINISH
