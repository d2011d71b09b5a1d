// Waits of a block for others. None is without end: whoever waits for too long gives up, says so, and goes on as if it had come,
// so that the launch ends. What it writes then is of no meaning, and the host does not hand it out.

// What a block waits for, in the lower bits of EXPIRED; an expert above.
enum Awaited : u32 { ORDER = 1, GATE_UP = 2, OTHERS = 3 };
constexpr u32 AWAITED_BITS = 4;

// What is never said, to see that the wait for it ends.
#ifndef WITHHELD
#define WITHHELD 0
#endif

// Looks between two looks at the clock, which takes as long as many.
constexpr u32 LOOKS = 1024;

__device__ inline u64 nanoseconds() {
    u64 now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    return now;
}

// Waits until `there` says so; false once it was given up, here or by another block. Who waits for the end of all others is
// patient, so that what they wait for is what is said.
template <typename There>
__device__ inline bool wait_for(const Params& p, u32 awaited, u32 expert, There there) {
    const u64 deadline = awaited == OTHERS ? 2 * p.deadline_ns : p.deadline_ns;
    u64 begin = 0;
    for (u32 looks = 1; !there(); ++looks) {
        if (looks % LOOKS != 0) continue;
        if (load_acquire(&p.control[EXPIRED]) != 0) return false;
        const u64 now = nanoseconds();
        if (begin == 0) begin = now;
        if (now - begin < deadline) continue;
        atomicCAS(&p.control[EXPIRED], 0u, awaited | expert << AWAITED_BITS);
        return false;
    }
    return true;
}
