// Runtime of the guests that start in 64-bit mode, ring 0, at the image's first byte.
//
// The host has made: an identity map of the first and the fourth GiB (user, writable, executable), a GDT, a TSS with a ring-0
// stack and IST 1. The runtime brings an IDT whose handlers count interrupts and record exceptions.
#include "ports.h"

#define IMAGE      0x100000
#define STACK      0x90000
#define USER_STACK 0x80000

#define KCODE   0x08
#define KDATA   0x10
#define UCODE32 0x1b
#define UDATA   0x23
#define UCODE   0x2b
#define CODE32  0x30
#define ABSENT  0x38
#define CODE16  0x50
#define DATA16  0x58

// The record of the last exception, and what to do about one.
#define R_VECTOR 0x8000
#define R_ERROR  0x8008
#define R_RIP    0x8010
#define R_CS     0x8018
#define R_FLAGS  0x8020
#define R_RSP    0x8028
#define R_CR2    0x8030
#define R_COUNT  0x8038
#define R_SS     0x8040
#define R_FRAME  0x8048
#define FIXUP    0x8100  // where to go on after the next exception; 0: it is a failure
#define HOOK     0x8108  // called for each exception instead (rax: vector, rdi: frame)
#define X2APIC   0x8110  // non-zero: end interrupts by MSR
#define RETURN   0x8118  // where HLT of ring 3 goes on in ring 0
#define IHOOK    0x8120  // called for each interrupt (rax: vector)
#define IFRAME   0x8128  // frame of the last interrupt
#define F_LINE   0x8180
#define F_GOT    0x8188
#define F_WANTED 0x8190
#define SAVED_RSP 0x8130
#define COUNTS   0x9000  // interrupts by vector, 32 bits each

.intel_syntax noprefix
.code64
.text
image:
        jmp     main

.org 0x1000
idt:
.set n, 0
.rept 256
.set stub, IMAGE + 0x2000 + n * 16
        .word   stub & 0xffff, KCODE
        .byte   -(n == 8)       // IST 1 for double faults (true is -1)
        .if (n == 3) || (n == 4) 
        .byte   0xee
        .else
        .byte   0x8e
        .endif
        .word   (stub >> 16) & 0xffff
        .long   0, 0
.set n, n + 1
.endr

.org 0x2000
.set n, 0
.rept 256
.balign 16
        .if (n != 8) && (n != 10) && (n != 11) && (n != 12) && (n != 13) && (n != 14) && (n != 17)
        push    0
        .endif
        push    n
        jmp     common
.set n, n + 1
.endr

.org 0x3000
idt_pointer:
        .word   0xfff
        .quad   IMAGE + 0x1000

common:
        push    rax
        push    rcx
        push    rdx
        push    rdi
        mov     rax, [rsp + 32]
        cmp     eax, 2
        je      interrupt
        cmp     eax, 32
        jae     interrupt
        cmp     eax, 13
        jne     3f
        test    byte ptr [rsp + 56], 3
        jz      3f
        mov     rcx, [rsp + 48]
        cmp     byte ptr [rcx], 0xf4
        je      to_ring0
3:      mov     [R_VECTOR], rax
        mov     rcx, [rsp + 40]
        mov     [R_ERROR], rcx
        mov     rcx, [rsp + 48]
        mov     [R_RIP], rcx
        mov     rcx, [rsp + 56]
        mov     [R_CS], rcx
        mov     rcx, [rsp + 64]
        mov     [R_FLAGS], rcx
        mov     rcx, [rsp + 72]
        mov     [R_RSP], rcx
        mov     rcx, [rsp + 80]
        mov     [R_SS], rcx
        lea     rdi, [rsp + 48]
        mov     [R_FRAME], rdi
        mov     rcx, cr2
        mov     [R_CR2], rcx
        inc     qword ptr [R_COUNT]
        cmp     qword ptr [HOOK], 0
        je      1f
        call    [HOOK]
        jmp     back
1:      mov     rcx, [FIXUP]
        test    rcx, rcx
        jz      unexpected
        mov     [rsp + 48], rcx
        mov     qword ptr [FIXUP], 0
        jmp     back

interrupt:
        lea     rdi, [rsp + 48]
        mov     [IFRAME], rdi
        lock inc dword ptr [COUNTS + rax * 4]
        cmp     qword ptr [IHOOK], 0
        je      1f
        call    [IHOOK]
        mov     rax, [rsp + 32]
1:      cmp     eax, 0x30               // below: from the 8259, which is not ours to tell
        jb      back
        cmp     eax, 0xff
        je      back
        cmp     qword ptr [X2APIC], 0
        jne     2f
        mov     edi, APIC
        mov     dword ptr [rdi + 0xb0], 0
        jmp     back
2:      mov     ecx, 0x80b
        xor     eax, eax
        xor     edx, edx
        wrmsr
back:
        pop     rdi
        pop     rdx
        pop     rcx
        pop     rax
        add     rsp, 16
        iretq

// From ring 3, where HLT is a general protection fault: on in ring 0 at [RETURN], with the stack as the ring-3 call left it.
to_ring0:
        mov     rsp, [SAVED_RSP]
        push    [RETURN]
        ret

// Reports an exception that nobody asked for: line 100000 + vector, RIP, error code.
unexpected:
        cmp     dword ptr [F_LINE], 0
        jne     2f
        mov     rbx, [R_RIP]
        mov     rax, [R_ERROR]
        mov     ecx, [R_VECTOR]
        add     ecx, 100000
        jmp     failed
2:      mov     ecx, [F_LINE]           // what failed could not say so from ring 3
        mov     rbx, [F_GOT]
        mov     rax, [F_WANTED]
failed: // rbx: got, rax: wanted, ecx: line
        mov     [F_LINE], ecx           // in case the ports can't be reached from here
        mov     [F_GOT], rbx
        mov     [F_WANTED], rax
        mov     rdx, rax
        mov     eax, ebx
        out     DETAIL, eax
        shr     rbx, 32
        mov     eax, ebx
        out     DETAIL, eax
        mov     eax, edx
        out     DETAIL, eax
        shr     rdx, 32
        mov     eax, edx
        out     DETAIL, eax
        mov     eax, ecx
        out     FAIL, eax
1:      cli
        hlt
        jmp     1b

.macro CHECK_ got, wanted, line
        push    rax
        push    rbx
        mov     rbx, \got
        movabs  rax, \wanted
        cmp     rax, rbx
        je      .Lgood\@
        mov     ecx, \line
        jmp     failed
.Lgood\@:
        pop     rbx
        pop     rax
.endm
// Fails unless a 64-bit register or memory operand (not relative to RSP or RAX) has a value.
#define CHECK(got, wanted) CHECK_ got, wanted, __LINE__

.macro CHECK32_ got, wanted, line
        push    rax
        push    rbx
        mov     ebx, \got
        mov     eax, \wanted
        cmp     rax, rbx
        je      .Lgood\@
        mov     ecx, \line
        jmp     failed
.Lgood\@:
        pop     rbx
        pop     rax
.endm
// The same for 32 bits.
#define CHECK32(got, wanted) CHECK32_ got, wanted, __LINE__

.macro FAULTS_ vector, error, line, code:vararg
        mov     qword ptr [R_VECTOR], 0xdead
        lea     rax, [rip + .Lfix\@]
        mov     [FIXUP], rax
.Lat\@:
        \code
        mov     ecx, \line
        mov     ebx, 0xdead
        mov     eax, \vector
        jmp     failed
.Lfix\@:
        CHECK_  [R_VECTOR], \vector, \line
        CHECK_  [R_ERROR], \error, \line
        lea     rax, [rip + .Lat\@]
        sub     rax, [R_RIP]
        CHECK_  rax, 0, \line
.endm
// One instruction that must raise an exception with an error code, at its own address. Changes RAX.
#define FAULTS(vector, error, code...) FAULTS_ vector, error, __LINE__, code

.macro FINISH
        xor     eax, eax
        out     EXIT, eax
1:      cli
        hlt
        jmp     1b
.endm

.macro PRINT_REPORT value
        mov     eax, \value
        out     REPORT, eax
.endm

// Calls `where` in ring 3 with IOPL 3; it comes back by HLT (a host that runs
// only ring 3 natively may not know INT n there).
.macro IN_RING3 where
        lea     rax, [rip + .Lback\@]
        mov     [RETURN], rax
        mov     [SAVED_RSP], rsp
        push    UDATA
        push    USER_STACK
        push    0x3202
        push    UCODE
        lea     rax, [rip + \where]
        push    rax
        iretq
.Lback\@:
.endm

.macro SETUP
        mov     rsp, STACK
        lidt    [rip + idt_pointer]
.endm

// Enables the local APIC with spurious vector 0xff (xAPIC).
.macro APIC_ON
        mov     esi, APIC
        mov     dword ptr [rsi + 0xf0], 0x1ff
        mov     dword ptr [rsi + 0x80], 0
.endm
