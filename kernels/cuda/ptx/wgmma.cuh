// Products of a warpgroup: 64 rows of A in registers times N columns of B in shared memory, 16 deep. They run beside
// other instructions until they are waited for.

// Numbers of the operands of 16 registers.
#define OPERANDS_0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define OPERANDS_1 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define OPERANDS_2 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define OPERANDS_3 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define OPERANDS_4 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define OPERANDS_5 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define OPERANDS_6 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define OPERANDS_7 "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define SUMS_4(at) "+f"(d[at]), "+f"(d[at + 1]), "+f"(d[at + 2]), "+f"(d[at + 3])
#define SUMS_8(at) SUMS_4(at), SUMS_4(at + 4)
#define SUMS_16(at) SUMS_8(at), SUMS_8(at + 8)
#define SUMS_32(at) SUMS_16(at), SUMS_16(at + 16)
#define SUMS_64(at) SUMS_32(at), SUMS_32(at + 32)

// A product of N columns adds to the first N / 2 sums of a thread.
template <u32 N>
struct Product;

// `rest` are the numbers of the operands after the sums: A, and the description of B.
#define PRODUCT(N, sums, a, b, ...)                                                             \
    template <>                                                                                 \
    struct Product<N> {                                                                         \
        template <u32 SUMS>                                                                     \
        static __device__ inline void add(float (&d)[SUMS], const u32 (&x)[4], u64 tokens) {    \
            asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" sums      \
                         "}, {" a "}, " b ", 1, 1, 1, 0;"                                       \
                         : __VA_ARGS__                                                          \
                         : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "l"(tokens));            \
        }                                                                                       \
    };

PRODUCT(16, "%0, %1, %2, %3, %4, %5, %6, %7", "%8, %9, %10, %11", "%12", SUMS_8(0))
PRODUCT(40, OPERANDS_0 ", %16, %17, %18, %19", "%20, %21, %22, %23", "%24", SUMS_16(0), SUMS_4(16))
PRODUCT(32, OPERANDS_0, "%16, %17, %18, %19", "%20", SUMS_16(0))
PRODUCT(48, OPERANDS_0 ", %16, %17, %18, %19, %20, %21, %22, %23", "%24, %25, %26, %27", "%28",
        SUMS_16(0), SUMS_8(16))
PRODUCT(64, OPERANDS_0 ", " OPERANDS_1, "%32, %33, %34, %35", "%36", SUMS_32(0))
PRODUCT(96, OPERANDS_0 ", " OPERANDS_1 ", " OPERANDS_2, "%48, %49, %50, %51", "%52", SUMS_32(0),
        SUMS_16(32))
PRODUCT(128, OPERANDS_0 ", " OPERANDS_1 ", " OPERANDS_2 ", " OPERANDS_3, "%64, %65, %66, %67",
        "%68", SUMS_64(0))
PRODUCT(144,
        OPERANDS_0 ", " OPERANDS_1 ", " OPERANDS_2 ", " OPERANDS_3
                   ", %64, %65, %66, %67, %68, %69, %70, %71",
        "%72, %73, %74, %75", "%76", SUMS_64(0), SUMS_8(64))
PRODUCT(160, OPERANDS_0 ", " OPERANDS_1 ", " OPERANDS_2 ", " OPERANDS_3 ", " OPERANDS_4,
        "%80, %81, %82, %83", "%84", SUMS_64(0), SUMS_16(64))
PRODUCT(192,
        OPERANDS_0 ", " OPERANDS_1 ", " OPERANDS_2 ", " OPERANDS_3 ", " OPERANDS_4
                   ", " OPERANDS_5,
        "%96, %97, %98, %99", "%100", SUMS_64(0), SUMS_32(64))
PRODUCT(224,
        OPERANDS_0 ", " OPERANDS_1 ", " OPERANDS_2 ", " OPERANDS_3 ", " OPERANDS_4
                   ", " OPERANDS_5 ", " OPERANDS_6,
        "%112, %113, %114, %115", "%116", SUMS_64(0), SUMS_32(64), SUMS_16(96))
PRODUCT(240,
        OPERANDS_0 ", " OPERANDS_1 ", " OPERANDS_2 ", " OPERANDS_3 ", " OPERANDS_4
                   ", " OPERANDS_5 ", " OPERANDS_6
                   ", %112, %113, %114, %115, %116, %117, %118, %119",
        "%120, %121, %122, %123", "%124", SUMS_64(0), SUMS_32(64), SUMS_16(96), SUMS_8(112))
PRODUCT(256,
        OPERANDS_0 ", " OPERANDS_1 ", " OPERANDS_2 ", " OPERANDS_3 ", " OPERANDS_4
                   ", " OPERANDS_5 ", " OPERANDS_6 ", " OPERANDS_7,
        "%128, %129, %130, %131", "%132", SUMS_64(0), SUMS_64(64))

// Before products that take registers which other instructions wrote.
__device__ inline void products_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ inline void products_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most LEFT committed groups run.
template <u32 LEFT>
__device__ inline void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// What reads sums after this reads them after the wait before it.
template <u32 COUNT>
__device__ inline void sums_ready(float (&d)[COUNT]) {
#pragma unroll
    for (u32 n = 0; n < COUNT; ++n) asm volatile("" : "+f"(d[n])::"memory");
}

// Describes rows of 128 bytes, 8 rows a swizzled kilobyte, from a shared address.
__device__ inline u64 describe_rows(u32 address) {
    return u64((address & 0x3ffff) >> 4) | u64(1) << 16 | u64(1024 >> 4) << 32 | u64(1) << 62;
}

template <u32 COUNT>
__device__ inline void registers_take() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <u32 COUNT>
__device__ inline void registers_give() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
