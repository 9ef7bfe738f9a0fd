// A hypercall that there is not, where CPUID has hypercalls at all: -ENOSYS.
#include "long.h"
main:
        SETUP
        mov     eax, 0x40000000
        cpuid
        cmp     ebx, 0x4b4d564b                 // "KVMK"
        jne     none
        mov     eax, 1000
        vmcall
        CHECK(rax, 0xfffffffffffffc18)
none:   FINISH
