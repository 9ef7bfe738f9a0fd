// Rings the doorbells of the test, with what matches and what does not.
#include "long.h"
main:
        SETUP
        mov     ebx, DEVICE + 0x1000
        mov     byte ptr [rbx], 1               // any length
        mov     word ptr [rbx], 2
        mov     dword ptr [rbx], 3
        mov     word ptr [rbx + 0x10], 1        // two bytes of any value
        mov     word ptr [rbx + 0x10], 2
        mov     dword ptr [rbx + 0x10], 3       // too long: to the device
        CHECK32([rbx + 0x10], 3)
        mov     word ptr [rbx + 0x20], 5
        mov     word ptr [rbx + 0x20], 6
        mov     word ptr [rbx + 0x20], 6
        mov     word ptr [rbx + 0x20], 8        // not that value: to the device
        movzx   eax, word ptr [rbx + 0x20]
        CHECK32(eax, 8)
        mov     dword ptr [rbx + 0x30], 7
        mov     dword ptr [rbx + 0x34], 7       // not there
        CHECK32([rbx + 0x34], 7)
        FINISH
