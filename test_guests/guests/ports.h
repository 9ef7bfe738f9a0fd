// Ports of the board that guests talk to (see src/board.rs).
#define TEXT      0xe9   // a byte of text
#define REPORT    0xea   // a 32-bit value for the host
#define DETAIL    0xeb   // got and wanted of a failed check, low half first
#define COMMAND   0xec   // asks the host to do something
#define EXIT      0xf4   // ends the test with a code
#define FAIL      0xf5   // ends the test as failed in a line
#define SCRATCH   0x300  // 64 bytes that keep what is written
#define STREAM    0x400  // reads count up byte by byte, writes are kept in order

#define DEVICE    0xd0000000  // 64 KiB of registers that keep what is written
#define APIC      0xfee00000
