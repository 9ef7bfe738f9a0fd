/* A bare-metal guest that does its worst to the devices of its machine, for tests of the machine.
 *
 * It runs in ring 0 with interrupts off, from the 64-bit entry of an ELF file. It says on the first serial port what it has done:
 *
 *   RINGS-OK, BARS-OK, PORTS-OK  wild queues, wild configuration space, wild ports: the disk is still read as it should be
 *   WILD                         from here on anything goes, until the guest has ended itself or is ended
 *   FAILED ...                   what was wrong
 *
 * It lies in pages 3421h to 342Fh: a balloon that takes the numbers it finds in rings and descriptors for page numbers does not meet those.
 * The number behind "seed=" on the command line makes another run of it. Registers: Virtio 1.2, sections 2.7, 2.8, 4.1; PCI Local Bus
 * 3.0, section 6; Linux's boot protocol for the zero page. */
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;

#define COUNT(array) (sizeof(array) / sizeof(array)[0])
/* Memory that devices may be led to: nothing of the guest itself is there. */
#define AREA 0x400000ul
#define AREA_SIZE 0x400000ul
#define PAGE 4096ul
#define RAM_END 0x4000000ul

enum { SERIAL = 0x3f8 };
enum { ACKNOWLEDGE = 1, DRIVER = 2, DRIVER_OK = 4, FEATURES_OK = 8 };
enum { INDIRECT = 28, EVENT_IDX = 29, VERSION_1 = 32, PACKED = 34 };

/* ---- the processor ---- */

static inline void out8(u16 port, u8 value) { __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port)); }
static inline void out16(u16 port, u16 value) { __asm__ volatile("outw %0, %1" : : "a"(value), "Nd"(port)); }
static inline void out32(u16 port, u32 value) { __asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port)); }
static inline u8 in8(u16 port) { u8 v; __asm__ volatile("inb %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline u16 in16(u16 port) { u16 v; __asm__ volatile("inw %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline u32 in32(u16 port) { u32 v; __asm__ volatile("inl %1, %0" : "=a"(v) : "Nd"(port)); return v; }

/* Enough for a device's thread to look at a queue. */
static void spin(u32 turns) {
    while (turns--)
        __asm__ volatile("pause");
}

/* What a compiler may call. */
void *memset(void *to, int value, u64 n) {
    void *start = to;
    __asm__ volatile("rep stosb" : "+D"(to), "+c"(n) : "a"(value) : "memory");
    return start;
}

void *memcpy(void *to, const void *from, u64 n) {
    void *start = to;
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(n) : : "memory");
    return start;
}

static u64 number = 0x9e3779b97f4a7c15;

static u64 next(void) {
    number ^= number << 13;
    number ^= number >> 7;
    number ^= number << 17;
    return number >> 3;
}

static u64 below(u64 limit) { return next() % limit; }
static int one_in(u64 n) { return below(n) == 0; }

/* ---- the serial port ---- */

static void say(const char *text) {
    out8(SERIAL + 3, 3); /* the divisor's registers are hidden again */
    out8(SERIAL + 1, 0);
    out8(SERIAL + 4, 3);
    for (; *text; text++) {
        for (u32 n = 0; n < 1000000 && !(in8(SERIAL + 5) & 0x20); n++) {}
        out8(SERIAL, *text);
    }
}

static void say_number(u64 value) {
    char text[17];
    for (int n = 0; n < 16; n++)
        text[n] = "0123456789abcdef"[value >> (60 - 4 * n) & 15];
    text[16] = 0;
    say(text);
}

static void __attribute__((noreturn)) failed(const char *what, u64 value) {
    say("FAILED ");
    say(what);
    say(" ");
    say_number(value);
    say("\n");
    for (;;)
        __asm__ volatile("cli; hlt");
}

/* ---- configuration space ---- */

static void select(u32 function, u32 offset) { out32(0xcf8, 0x80000000u | function << 8 | (offset & 0xfc)); }

static u32 config(u32 function, u32 offset) {
    select(function, offset);
    return in32(0xcfc);
}

static u8 config8(u32 function, u32 offset) { return config(function, offset) >> 8 * (offset & 3); }

static void set_config(u32 function, u32 offset, u32 value) {
    select(function, offset);
    out32(0xcfc, value);
}

static u64 bar(u32 function, u32 n) {
    u32 low = config(function, 0x10 + 4 * n);
    u64 high = (low & 6) == 4 ? config(function, 0x14 + 4 * n) : 0;
    return high << 32 | (low & ~15u);
}

/* ---- virtio devices ---- */

struct device {
    u32 function;
    u32 id; /* as virtio counts devices: 2 is a disk */
    volatile u8 *common, *notify, *isr, *own;
    u32 notify_step, own_size;
};

static struct device devices[32];
static u32 device_count;

#define AT8(d, offset) (*(volatile u8 *)((d)->common + (offset)))
#define AT16(d, offset) (*(volatile u16 *)((d)->common + (offset)))
#define AT32(d, offset) (*(volatile u32 *)((d)->common + (offset)))
#define STATUS(d) AT8(d, 0x14)
#define QUEUE(d) AT16(d, 0x16)
#define QUEUE_SIZE(d) AT16(d, 0x18)
#define QUEUE_ENABLE(d) AT16(d, 0x1c)
#define NOTIFY_OFF(d) AT16(d, 0x1e)

static void set64(struct device *d, u32 offset, u64 value) {
    AT32(d, offset) = value;
    AT32(d, offset + 4) = value >> 32;
}

/* Takes the places of a device's registers out of its capabilities (section 4.1.4). */
static void find_registers(struct device *d) {
    for (u8 at = config8(d->function, 0x34); at; at = config8(d->function, at + 1)) {
        if (config8(d->function, at) != 9)
            continue;
        volatile u8 *place = (u8 *)bar(d->function, config8(d->function, at + 4)) + config(d->function, at + 8);
        switch (config8(d->function, at + 3)) {
        case 1:
            d->common = place;
            break;
        case 2:
            d->notify = place;
            d->notify_step = config(d->function, at + 16);
            break;
        case 3:
            d->isr = place;
            break;
        case 4:
            d->own = place;
            d->own_size = config(d->function, at + 12);
            break;
        }
    }
}

static void find_devices(void) {
    for (u32 function = 0; function < 16 << 8; function++) {
        u32 id = config(function, 0);
        if ((id & 0xffff) != 0x1af4 || id >> 16 < 0x1040 || id >> 16 > 0x107f || device_count == COUNT(devices))
            continue;
        struct device *d = &devices[device_count];
        d->function = function;
        d->id = (id >> 16) - 0x1040;
        find_registers(d);
        if (d->common && d->notify)
            device_count++;
    }
}

static void reset(struct device *d) {
    STATUS(d) = 0;
    for (u32 n = 0; STATUS(d) != 0; n++) {
        spin(1000);
        if (n == 100000)
            failed("a reset that does not end", d->id);
    }
}

static u64 offered(struct device *d) {
    AT32(d, 0) = 0;
    u64 low = AT32(d, 4);
    AT32(d, 0) = 1;
    return (u64)AT32(d, 4) << 32 | low;
}

static void accept(struct device *d, u64 features) {
    AT32(d, 8) = 0;
    AT32(d, 12) = features;
    AT32(d, 8) = 1;
    AT32(d, 12) = features >> 32;
    STATUS(d) |= FEATURES_OK;
}

static void kick(struct device *d, u16 queue) {
    QUEUE(d) = queue;
    *(volatile u16 *)(d->notify + NOTIFY_OFF(d) * (u64)d->notify_step) = queue;
}

struct descriptor {
    u64 address;
    u32 length;
    u16 flags, next;
};

/* Reads the first sector of the first disk as an honest driver does; it says what it is. */
static void the_disk_is_read(const char *behind) {
    static const char wanted[] = "the first sector of the first disk";
    struct device *d = devices;
    while (d < devices + device_count && d->id != 2)
        d++;
    if (d == devices + device_count)
        return;
    volatile struct descriptor *table = (void *)AREA;
    volatile u16 *available = (void *)(AREA + PAGE), *used = (void *)(AREA + 2 * PAGE);
    volatile u64 *request = (void *)(AREA + 3 * PAGE);
    volatile char *data = (void *)(AREA + 4 * PAGE);
    memset((void *)AREA, 0, 8 * PAGE);
    reset(d);
    STATUS(d) = ACKNOWLEDGE | DRIVER;
    accept(d, 1ul << VERSION_1);
    QUEUE(d) = 0;
    QUEUE_SIZE(d) = 8;
    set64(d, 0x20, (u64)table);
    set64(d, 0x28, (u64)available);
    set64(d, 0x30, (u64)used);
    QUEUE_ENABLE(d) = 1;
    STATUS(d) |= DRIVER_OK;
    table[0] = (struct descriptor){(u64)request, 16, 1, 1};
    table[1] = (struct descriptor){(u64)data, 512, 3, 2};
    table[2] = (struct descriptor){(u64)data + 512, 1, 2, 0};
    data[512] = 0x7f;
    available[1] = 1;
    kick(d, 0);
    for (u32 n = 0; used[1] != 1; n++) {
        spin(1000);
        if (n == 100000)
            failed(behind, 0x100 | STATUS(d));
    }
    for (u32 n = 0; n < sizeof wanted - 1; n++)
        if (data[n] != wanted[n])
            failed(behind, 0x200 | n);
    if (data[512] != 0)
        failed(behind, 0x300 | data[512]);
    reset(d);
}

/* ---- wild queues ---- */

static u64 wild_address(void) {
    switch (below(10)) {
    case 0:
        return RAM_END - below(32);
    case 1:
        return RAM_END + below(0x10000);
    case 2:
        return (u64)devices[below(device_count)].common + below(0x4000);
    case 3:
        return next() << 3;
    case 4:
        return -below(0x2000);
    default:
        return AREA + below(AREA_SIZE);
    }
}

static u32 wild_length(void) {
    static const u32 lengths[] = {0, 1, 2, 8, 16, 511, 512, 513, 1514, 4096, 65536, 0x7fffffff, 0xffffffff};
    return one_in(8) ? next() : lengths[below(COUNT(lengths))];
}

/* Descriptors whose links lead anywhere, also round in a circle. The same bytes are one of a packed ring. */
static void wild_descriptors(u64 at, u32 count) {
    volatile struct descriptor *table = (void *)at;
    for (u32 n = 0; n < count; n++) {
        u16 flags = one_in(16) ? next() : below(8) | (one_in(2) ? 0x80 : 0) | (one_in(8) ? 0x8000 : 0);
        /* An indirect table is good for something only where descriptors are. */
        u64 address = flags & 4 && one_in(2) ? at + 16 * below(count) : wild_address();
        u32 length = flags & 4 && one_in(2) ? 16 * below(count) : wild_length();
        table[n] = (struct descriptor){address, length, flags, below(count + 2)};
    }
}

static void wild_data(void) {
    volatile u32 *words = (void *)(AREA + AREA_SIZE / 2);
    for (u32 n = 0; n < 4096; n++)
        words[below(AREA_SIZE / 8)] = one_in(2) ? below(16) : next();
}

static void wild_queue(struct device *d, u16 queue) {
    u32 most = QUEUE_SIZE(d);
    u32 size = one_in(8) ? next() : most ? most >> below(5) : 1;
    u32 count = size && size <= 1024 ? size : 256;
    u64 table = AREA + queue % 16 * 0x10000, available = table + 0x8000, used = table + 0xc000;
    wild_descriptors(table, count);
    volatile u16 *ring = (void *)available;
    ring[0] = below(4);
    ring[1] = one_in(8) ? next() : below(count + 2);
    for (u32 n = 0; n < count; n++)
        ring[2 + n] = below(one_in(16) ? 0x10000 : count);
    QUEUE(d) = queue;
    QUEUE_SIZE(d) = size;
    set64(d, 0x20, one_in(16) ? wild_address() : table);
    set64(d, 0x28, one_in(16) ? wild_address() : available);
    set64(d, 0x30, one_in(16) ? wild_address() : used);
    QUEUE_ENABLE(d) = one_in(16) ? next() : 1;
}

static void wild_registers(struct device *d) {
    switch (below(6)) {
    case 0:
        AT8(d, below(64)) = next();
        break;
    case 1:
        AT32(d, below(16) * 4) = next();
        break;
    case 2:
        if (d->own_size)
            d->own[below(d->own_size)] = next();
        break;
    case 3:
        *(volatile u32 *)(d->notify + below(256) * 4) = next();
        break;
    case 4:
        if (d->isr)
            (void)*d->isr;
        break;
    case 5:
        kick(d, next());
        break;
    }
}

static void attack_queues(u32 rounds) {
    for (u32 round = 0; round < rounds && device_count; round++) {
        struct device *d = &devices[below(device_count)];
        reset(d);
        STATUS(d) = ACKNOWLEDGE | DRIVER;
        u64 features = offered(d);
        if (one_in(2))
            features &= ~(1ul << PACKED);
        if (one_in(2))
            features &= next() | 1ul << VERSION_1;
        accept(d, one_in(16) ? next() : features);
        u16 queues = AT16(d, 0x12);
        for (u16 queue = 0; queue < queues && queue < 16; queue++)
            wild_queue(d, queue);
        wild_data();
        STATUS(d) |= DRIVER_OK;
        for (u16 queue = 0; queue < queues && queue < 16; queue++)
            kick(d, queue);
        for (u64 n = below(20); n; n--) {
            spin(below(3000));
            wild_registers(d);
            if (one_in(4))
                wild_queue(d, below(queues + 1));
        }
        reset(d);
    }
}

/* ---- wild configuration space ---- */

/* Where a BAR has no business. */
static u32 wild_place(void) {
    static const u32 places[] = {0,          0x200000,   0xa0000,    0xf0000,    RAM_END - 4096, 0xb0000000,
                                 0xe0000000, 0xfec00000, 0xfed00000, 0xfee00000, 0xfffff000,     0xffffffff};
    return one_in(4) ? next() : places[below(COUNT(places))];
}

static void attack_bars(u32 rounds) {
    for (u32 n = 0; n < device_count; n++) {
        struct device *d = &devices[n];
        u32 saved[16];
        for (u32 word = 0; word < 16; word++)
            saved[word] = config(d->function, 4 * word);
        for (u32 round = 0; round < rounds; round++) {
            set_config(d->function, 0x10 + 4 * below(6), wild_place());
            if (one_in(4))
                set_config(d->function, 4, below(8));
            if (one_in(4))
                set_config(d->function, 4 + below(63) * 4, next());
            /* Reads alone: they may meet memory that is in use. */
            (void)*(volatile u32 *)(u64)(wild_place() & ~4095u);
            (void)*(volatile u32 *)d->common;
        }
        set_config(d->function, 4, 0);
        for (u32 word = 2; word < 16; word++)
            set_config(d->function, 4 * word, saved[word]);
        set_config(d->function, 4, saved[1] & 0xffff);
    }
}

/* ---- wild ports ---- */

static int ends_or_changes_the_guest(u16 port) {
    return (port >= 0x5d && port <= 0x64)      /* keyboard controller: reset */
           || (port >= 0x8f && port <= 0x92)   /* reset */
           || (port >= 0x502 && port <= 0x51b) /* panic, fw_cfg's DMA */
           || (port >= 0x5fd && port < 0x680)  /* power */
           || (port >= 0xcf5 && port <= 0xcff);
}

static void wild_port(u16 port) {
    switch (below(6)) {
    case 0:
        out8(port, next());
        break;
    case 1:
        out16(port, next());
        break;
    case 2:
        out32(port, next());
        break;
    case 3:
        (void)in8(port);
        break;
    case 4:
        (void)in16(port);
        break;
    case 5:
        (void)in32(port);
        break;
    }
}

static void attack_ports(void) {
    for (u32 port = 0; port < 0x10000; port++)
        for (u32 n = port < 0x1000 ? 8 : 1; n; n--)
            if (!ends_or_changes_the_guest(port))
                wild_port(port);
}

/* ---- anything ---- */

static int anything_goes;

static u64 wild_register(void) {
    static const u64 places[] = {0xb0000000, 0xe0000000, 0xfeb00000, 0xfec00000, 0xfed00000, 0xfee00000, 0xfef00000, 0xffc00000};
    if (device_count && one_in(3))
        return (u64)devices[below(device_count)].common + below(0x4000);
    return places[below(COUNT(places))] + below(one_in(4) ? 0x100000 : 0x1000);
}

static void __attribute__((noreturn)) do_anything(void) {
    for (;;) {
        u64 place = wild_register();
        switch (below(8)) {
        case 0:
            *(volatile u8 *)place = next();
            break;
        case 1:
            *(volatile u16 *)place = next();
            break;
        case 2:
        case 3:
            *(volatile u32 *)place = next();
            break;
        case 4:
            *(volatile u64 *)place = next();
            break;
        case 5:
            (void)*(volatile u32 *)place;
            break;
        case 6:
            set_config(below(one_in(2) ? 0x100 : 0x800), below(64) * 4, one_in(2) ? wild_place() : next());
            break;
        case 7:
            place = one_in(2) ? below(0x1000) : next();
            if (!ends_or_changes_the_guest(place) || one_in(1000))
                wild_port(place);
            break;
        }
    }
}

/* ---- start ---- */

u8 stack[0x4000] __attribute__((aligned(16), used));
static u64 pml4[512] __attribute__((aligned(4096))), pdpt[512] __attribute__((aligned(4096)));
static struct {
    u16 low, selector, attributes, middle;
    u32 high, zero;
} idt[256] __attribute__((aligned(16)));

/* The end of every exception and NMI: while anything goes, the next thing. */
__asm__(".globl stopped\n"
        "stopped:\n"
        "  mov 8(%rsp), %rdi\n" /* RIP where there is an error code, else CS */
        "  lea stack + 0x4000(%rip), %rsp\n"
        "  call exception\n");

void __attribute__((noreturn)) exception(u64 at) {
    if (!anything_goes)
        failed("an exception at", at);
    do_anything();
}

extern u8 stopped[];

/* The loader's is in low memory, which a balloon may have taken. */
static u64 gdt[] = {0, 0, 0x00af9b000000ffff, 0x00cf93000000ffff};

static void set_up_the_processor(void) {
    struct {
        u16 limit;
        u64 base;
    } __attribute__((packed)) table = {sizeof gdt - 1, (u64)gdt};
    u16 code;
    __asm__ volatile("lgdt %1\n  mov %%cs, %0" : "=r"(code) : "m"(table));
    pml4[0] = (u64)pdpt | 3;
    for (u64 n = 0; n < 512; n++)
        pdpt[n] = n << 30 | 0x83;
    __asm__ volatile("mov %0, %%cr3" : : "r"(pml4) : "memory");
    for (u32 n = 0; n < 256; n++) {
        u64 at = (u64)stopped;
        idt[n].low = at;
        idt[n].selector = code;
        idt[n].attributes = 0x8e00;
        idt[n].middle = at >> 16;
        idt[n].high = at >> 32;
    }
    struct {
        u16 limit;
        u64 base;
    } __attribute__((packed)) pointer = {sizeof idt - 1, (u64)idt};
    __asm__ volatile("lidt %0" : : "m"(pointer));
}

static void take_seed(const u8 *zero_page) {
    const char *line = (const char *)(u64)(*(const u32 *)(zero_page + 0x228));
    for (; *line && line[0] != '='; line++) {}
    for (; *line; line++)
        number = number * 31 + *line;
}

void __attribute__((noreturn)) main(const u8 *zero_page) {
    set_up_the_processor();
    take_seed(zero_page);
    find_devices();
    the_disk_is_read("before anything");
    say("DEVICES ");
    say_number(device_count);
    say("\n");
    attack_queues(2000);
    the_disk_is_read("behind wild queues");
    say("RINGS-OK\n");
    attack_bars(300);
    the_disk_is_read("behind wild BARs");
    say("BARS-OK\n");
    attack_ports();
    the_disk_is_read("behind wild ports");
    say("PORTS-OK\n");
    say("WILD\n");
    anything_goes = 1;
    do_anything();
}

__asm__(".globl _start\n"
        "_start:\n"
        "  cli\n"
        "  lea stack + 0x4000(%rip), %rsp\n"
        "  mov %rsi, %rdi\n"
        "  call main\n");
