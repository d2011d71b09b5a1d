// Hopper's asynchronous copies, the barriers that count their bytes, and words that other
// multiprocessors read.

__device__ inline u32 shared_address(const void* pointer) {
    return u32(__cvta_generic_to_shared(pointer));
}

__device__ inline void barrier_init(u64* barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
                 : "memory");
}

// Makes initialised barriers visible to asynchronous copies.
__device__ inline void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void barrier_arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ inline void barrier_arrive_expecting(u64* barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
}

__device__ inline void barrier_wait(u64* barrier, u32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
        "@done bra.uni end;\n"
        "bra.uni again;\n"
        "end:\n"
        "}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

__device__ inline bool barrier_test(u64* barrier, u32 parity) {
    u32 done;
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.test_wait.parity.shared.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n"
        "}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
    return done != 0;
}

// Weights pass once: they are the first that the cache may give up.
constexpr u64 EVICT_FIRST = 0x12f0000000000000;

__device__ inline void copy_weights(void* to, const void* from, u32 bytes, u64* barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1], %2, [%3], %4;" ::"r"(shared_address(to)),
        "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(EVICT_FIRST)
        : "memory");
}

__device__ inline void copy_row(void* to, const void* from, u32 bytes, u64* barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(shared_address(to)),
        "l"(from), "r"(bytes), "r"(shared_address(barrier))
        : "memory");
}

// Copies out of shared memory; its source may be written again once `copied_out` says so, and what it wrote is there once
// `copied_out_whole` does. All by one thread.
__device__ inline void copy_out(void* to, const void* from, u32 bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to),
                 "r"(shared_address(from)), "r"(bytes)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

__device__ inline void copied_out() {
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

__device__ inline void copied_out_whole() {
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// Between ordinary writes and asynchronous reads of the same memory, on both sides.
__device__ inline void proxy_fence() { asm volatile("fence.proxy.async;" ::: "memory"); }

__device__ inline void add_release(u32* word, u32 value) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}

__device__ inline void store_release(u32* word, u32 value) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}

__device__ inline u32 load_acquire(const u32* word) {
    u32 value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
    return value;
}

// A barrier of the maths warps alone.
__device__ inline void maths_sync(u32 threads) {
    asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory");
}

// Waits as above; returns 0 in a way that the compiler cannot see through. What is loaded from an
// address to which it was added is loaded after the wait, and may otherwise be moved about freely.
__device__ inline u32 barrier_wait_token(u32 barrier, u32 parity) {
    u32 token;
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared.b64 done, [%1], %2;\n"
        "@done bra.uni end;\n"
        "bra.uni again;\n"
        "end:\n"
        "mov.u32 %0, 0;\n"
        "}"
        : "=r"(token)
        : "r"(barrier), "r"(parity)
        : "memory");
    return token;
}

__device__ inline uint4 load16(u32 from) {
    uint4 to;
    asm("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(to.x), "=r"(to.y), "=r"(to.z), "=r"(to.w)
        : "r"(from));
    return to;
}

__device__ inline uint2 load8(u32 from) {
    uint2 to;
    asm("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(to.x), "=r"(to.y) : "r"(from));
    return to;
}

__device__ inline u32 load2(u32 from) {
    u16 to;
    asm("ld.shared.u16 %0, [%1];" : "=h"(to) : "r"(from));
    return to;
}

__device__ inline void store4(u32 to, u32 value) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(value) : "memory");
}

// Loads if `there`; otherwise leaves what was there before.
__device__ inline void load16_if(uint4& to, u32 from, bool there) {
    asm("{\n"
        ".reg .pred there;\n"
        "setp.ne.u32 there, %5, 0;\n"
        "@there ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n"
        "}"
        : "+r"(to.x), "+r"(to.y), "+r"(to.z), "+r"(to.w)
        : "r"(from), "r"(u32(there)));
}

// What comes after this comes after the sums are made.
__device__ inline void done_with(float a, float b) { asm volatile("" ::"f"(a), "f"(b)); }

__device__ inline void arrive_if(u32 barrier, bool arrives) {
    asm volatile(
        "{\n"
        ".reg .pred arrives;\n"
        "setp.ne.u32 arrives, %1, 0;\n"
        "@arrives mbarrier.arrive.shared.b64 _, [%0];\n"
        "}" ::"r"(barrier),
        "r"(u32(arrives))
        : "memory");
}

// The same value on all lanes, or each lane's own, from where the compiler cannot follow it: it keeps
// the value instead of computing it again in every loop.
__device__ inline u32 kept_uniform(u32 value) { return __shfl_sync(~0u, value, 0); }
__device__ inline u32 kept(u32 value) { return __shfl_sync(~0u, value, threadIdx.x % 32); }

// What comes after this comes after the words are computed.
__device__ inline void taken(const u32 (&words)[4]) {
    asm volatile("" ::"r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]));
}
