// Memory that comes, goes and changes while the guest runs.
#include "long.h"
#define PLACE 0x10000000
#define ADD_RAM    1
#define REMOVE     2
#define ADD_ROM    3
#define ADD_HIGH   4
main:
        SETUP
        mov     ebx, PLACE
        mov     r15d, 3
1:      mov     rax, [rbx]              // device space that nobody answers
        CHECK(rax, 0xffffffffffffffff)
        mov     eax, ADD_RAM
        out     COMMAND, eax
        mov     rax, [rbx]
        CHECK(rax, 0x1111111111111111)
        mov     qword ptr [rbx + 0xff8], 0x77
        mov     rax, [rbx + 0xff8]
        CHECK(rax, 0x77)
        // Code in it runs.
        mov     dword ptr [rbx + 0x800], 0xc3102ab0     // mov al, 0x2a; adc bl, al
        mov     byte ptr [rbx + 0x802], 0xc3            // ret
        xor     eax, eax
        lea     rcx, [rbx + 0x800]
        call    rcx
        CHECK32(eax, 0x2a)
        mov     eax, REMOVE
        out     COMMAND, eax
        mov     rax, [rbx + 0xff8]
        CHECK(rax, 0xffffffffffffffff)
        mov     eax, ADD_ROM
        out     COMMAND, eax
        mov     rax, [rbx]
        CHECK(rax, 0x2222222222222222)
        mov     dword ptr [rbx + 8], 0x1234             // goes to device space
        mov     rax, [rbx + 8]
        CHECK(rax, 0x2222222222222222)
        lock add dword ptr [rbx + 16], 1
        mov     rax, [rbx + 16]
        CHECK(rax, 0x2222222222222222)
        mov     eax, REMOVE
        out     COMMAND, eax
        dec     r15d
        jnz     1b
        FINISH
