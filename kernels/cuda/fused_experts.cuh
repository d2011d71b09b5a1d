// FC1, activation and FC2 of all experts in one persistent launch: a block for each multiprocessor,
// one warp that copies and 16 that multiply.
//
// The copying warp draws tickets. A ticket is a row block (16 tiles of 16 rows) of FC1 or FC2 of a
// job; FC1 of job j + lag comes before FC2 of job j, so that what FC2 waits for was drawn long
// before. Stages of a ring take the weights of 256 columns (64 where those do not divide by 256) and
// the tokens' values in them; a maths warp multiplies its tile with all tokens of the job. Every
// output is one sum in one order over all columns, whatever shares the job.

constexpr u32 MATHS_WARPS = 16;
constexpr u32 FUSED_THREADS = (MATHS_WARPS + 1) * 32;
constexpr u32 STAGES = 4;
constexpr u32 WEIGHT_BYTES = BLOCK_TILES * WIDE_STEPS * (STEP_CODE_BYTES + STEP_COLUMNS);
// Rows of tokens are apart by a quarter of the banks more than their length.
constexpr u32 ROW_BYTES = 2 * WIDE_STEPS * STEP_COLUMNS + 16;
constexpr u32 STAGE_BYTES = WEIGHT_BYTES + JOB_TOKENS * ROW_BYTES;
constexpr u32 BLOCK_COLUMNS = BLOCK_TILES * 8;

// What a ticket asks for.
struct Task {
    u32 phase;  // 0 is FC1, 1 is FC2, 2 is the end
    u32 job;
    u32 block;
    u32 tiles;
    u32 expert;
    u32 first;
    u32 count;
    u32 units;
};

struct Ring {
    u8 stages[STAGES][STAGE_BYTES];
    float y[JOB_TOKENS][BLOCK_COLUMNS];
    u64 full[STAGES];
    u64 empty[STAGES];
    Task tasks[STAGES];  // in the first stage of each task
};

// Where in the ring a warp is.
struct Cursor {
    u32 stage = 0;
    u32 parity = 0;
    __device__ void advance() {
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
};

__device__ inline u32 tiles_of(const Params& p, u32 phase) {
    return phase == 0 ? p.intermediate / 8 : p.hidden / 16;
}

// The task of a ticket. Tickets: FC1 of the first jobs; then by turns FC1 of a job and FC2 of the one
// `lag` before it; then FC2 of the last jobs.
__device__ inline Task task_of(const Params& p, u32 ticket, u32 jobs) {
    const u32 blocks[2] = {(tiles_of(p, 0) + BLOCK_TILES - 1) / BLOCK_TILES,
                           (tiles_of(p, 1) + BLOCK_TILES - 1) / BLOCK_TILES};
    const u32 lag = min(p.lag, jobs), both = blocks[0] + blocks[1];
    const u32 head = lag * blocks[0], middle = (jobs - lag) * both;
    Task task = {};
    if (ticket < head) {
        task.job = ticket / blocks[0];
        task.block = ticket % blocks[0];
    } else if (ticket < head + middle) {
        const u32 turn = (ticket - head) / both, within = (ticket - head) % both;
        task.phase = within < blocks[0] ? 0 : 1;
        task.job = task.phase == 0 ? lag + turn : turn;
        task.block = task.phase == 0 ? within : within - blocks[0];
    } else {
        const u32 at = ticket - head - middle;
        task.phase = 1;
        task.job = jobs - lag + at / blocks[1];
        task.block = at % blocks[1];
        if (task.job >= jobs) {
            task.phase = 2;
            return task;
        }
    }
    const Job job = p.jobs[task.job];
    task.expert = job.expert;
    task.first = job.first;
    task.count = job.count;
    task.tiles = min(tiles_of(p, task.phase) - task.block * BLOCK_TILES, BLOCK_TILES);
    task.units = units_of(task.phase == 0 ? p.hidden : p.intermediate);
    return task;
}

__device__ inline void fill(const Params& p, Ring& ring, Cursor& at, const Task& task, u32 lane) {
    const u32 columns = task.phase == 0 ? p.hidden : p.intermediate;
    const u32 width = unit_steps(columns) * STEP_COLUMNS, unit = unit_bytes(columns);
    const u8* weights = task.phase == 0 ? p.fc1 : p.fc2;
    weights += (size_t(task.expert) * tiles_of(p, task.phase) + task.block * BLOCK_TILES) *
               tile_bytes(columns);
    const u16* row = nullptr;
    if (lane < task.count) {
        const u32 pair = task.first + lane;
        row = task.phase == 0 ? p.x + size_t(p.pairs[pair].token) * columns
                              : p.mid + size_t(pair) * columns;
    }
    for (u32 n = 0; n < task.units; ++n) {
        const u32 bytes = 2 * min(width, columns - n * width);
        u8* stage = ring.stages[at.stage];
        u64* full = &ring.full[at.stage];
        barrier_wait(&ring.empty[at.stage], at.parity ^ 1);
        if (lane == 0) {
            if (n == 0) ring.tasks[at.stage] = task;
            barrier_arrive_expecting(full, task.tiles * unit + task.count * bytes);
            copy_weights(stage, weights + size_t(n) * task.tiles * unit, task.tiles * unit, full);
        }
        __syncwarp();
        if (row != nullptr)
            copy_row(stage + WEIGHT_BYTES + lane * ROW_BYTES, row + n * width, bytes, full);
        at.advance();
    }
}

__device__ inline void produce(const Params& p, Ring& ring, u32 lane) {
    const u32 jobs = p.control[0];
    Cursor at;
    u32 ticket = 0;
    if (lane == 0) ticket = atomicAdd(&p.control[1], 1u);
    while (true) {
        const Task task = task_of(p, __shfl_sync(~0u, ticket, 0), jobs);
        if (task.phase == 2) break;
        // The next ticket is on its way while this one is worked on.
        if (lane == 0) ticket = atomicAdd(&p.control[1], 1u);
        if (task.phase == 1) {
            while (load_acquire(&p.counters[task.job]) < tiles_of(p, 0)) {}
            proxy_fence();
            __syncwarp();
        }
        fill(p, ring, at, task, lane);
    }
    barrier_wait(&ring.empty[at.stage], at.parity ^ 1);
    if (lane == 0) {
        ring.tasks[at.stage].phase = 2;
        barrier_arrive(&ring.full[at.stage]);
    }
}

__device__ inline void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// One stage: this warp's tile times N tiles of 8 tokens. Words of even and odd number are summed
// apart, so that additions do not wait for one another; the two sums meet at the end.
template <u32 N>
__device__ inline void multiply(const u8* stage, u32 warp, u32 lane, u32 steps, u32 columns_left,
                                u32 count, float (&d)[2][N][4]) {
    const u32 g = lane / 4, c = lane % 4;
    const u8* weights = stage + warp * steps * (STEP_CODE_BYTES + STEP_COLUMNS);
    const u16* scales =
        reinterpret_cast<const u16*>(weights + steps * STEP_CODE_BYTES) + lane * steps;
    const u8* rows = stage + WEIGHT_BYTES + g * ROW_BYTES + c * 2 * BLOCK;
#pragma unroll 1
    for (u32 step = 0; step < steps; ++step) {
        const uint4 codes =
            *reinterpret_cast<const uint4*>(weights + step * STEP_CODE_BYTES + lane * 16);
        const u32 pair = scales[step];
        const u32 low = scale_pair(pair & 0xff), high = scale_pair(pair >> 8);
        const bool inside = step * STEP_COLUMNS + c * BLOCK < columns_left;
        uint4 x[N][2];
#pragma unroll
        for (u32 n = 0; n < N; ++n) {
            const bool there = inside && n * 8 + g < count;
            const u8* from = rows + n * 8 * ROW_BYTES + step * 2 * STEP_COLUMNS;
            x[n][0] = there ? *reinterpret_cast<const uint4*>(from) : uint4{};
            x[n][1] = there ? *reinterpret_cast<const uint4*>(from + 16) : uint4{};
        }
        u32 a[4];
        decode(codes.x, low, high, a);
#pragma unroll
        for (u32 n = 0; n < N; ++n) mma(d[0][n], a, x[n][0].x, x[n][0].y);
        decode(codes.y, low, high, a);
#pragma unroll
        for (u32 n = 0; n < N; ++n) mma(d[1][n], a, x[n][0].z, x[n][0].w);
        decode(codes.z, low, high, a);
#pragma unroll
        for (u32 n = 0; n < N; ++n) mma(d[0][n], a, x[n][1].x, x[n][1].y);
        decode(codes.w, low, high, a);
#pragma unroll
        for (u32 n = 0; n < N; ++n) mma(d[1][n], a, x[n][1].z, x[n][1].w);
    }
}

__device__ inline float activate(const Params& p, float gate, float up) {
    // Not fminf and fmaxf, which would turn a NaN into a number.
    gate = gate > p.limit ? p.limit : gate;
    up = up > p.limit ? p.limit : (up < -p.limit ? -p.limit : up);
    const float sigmoid = __fdiv_rn(1.0f, 1.0f + expf(-__fmul_rn(p.alpha, gate)));
    return __fmul_rn(__fmul_rn(__fadd_rn(up, p.beta), gate), sigmoid);
}

// act=nvfp4: the block's columns of the intermediate, from shared memory.
__device__ inline void quantise_block(const Params& p, Ring& ring, const Task& task, u32 thread) {
    maths_sync(MATHS_WARPS * 32);
    const u32 blocks = task.tiles / 2;
    const float norm_const = p.scalars[task.expert].norm_const;
    for (u32 n = thread; n < task.count * blocks; n += MATHS_WARPS * 32) {
        const u32 token = n / blocks, column = n % blocks * BLOCK;
        float y[BLOCK];
        for (u32 k = 0; k < BLOCK; ++k) y[k] = ring.y[token][column + k];
        requantise(y, norm_const);
        u16* mid = p.mid + size_t(task.first + token) * p.intermediate +
                   task.block * BLOCK_COLUMNS + column;
        for (u32 k = 0; k < BLOCK; ++k) mid[k] = bf16_bits(y[k]);
    }
    proxy_fence();
    maths_sync(MATHS_WARPS * 32);
}

template <u32 N>
__device__ inline void finish_gate_up(const Params& p, Ring& ring, const Task& task, u32 warp,
                                      u32 lane, const float (&d)[2][N][4]) {
    const u32 g = lane / 4, c = lane % 4;
    const Scalars scalars = p.scalars[task.expert];
#pragma unroll
    for (u32 n = 0; n < N * 2; ++n) {
        const u32 token = n / 2 * 8 + 2 * c + n % 2;
        if (token >= task.count || warp >= task.tiles) continue;
        const float gate = __fadd_rn(d[0][n / 2][n % 2], d[1][n / 2][n % 2]);
        const float up = __fadd_rn(d[0][n / 2][2 + n % 2], d[1][n / 2][2 + n % 2]);
        float y = activate(p, __fmul_rn(scalars.gate_alpha, gate), __fmul_rn(scalars.up_alpha, up));
        if (!p.weights_in_combine) y = __fmul_rn(y, p.pairs[task.first + token].weight);
        const u32 column = warp * 8 + g;
        if (p.quantised) {
            ring.y[token][column] = y;
        } else {
            p.mid[size_t(task.first + token) * p.intermediate + task.block * BLOCK_COLUMNS +
                  column] = bf16_bits(y);
        }
    }
    if (p.quantised) {
        quantise_block(p, ring, task, warp * 32 + lane);
    } else {
        proxy_fence();
        __syncwarp();
    }
    if (lane == 0 && warp < task.tiles) add_release(&p.counters[task.job], 1);
}

template <u32 N>
__device__ inline void finish_down(const Params& p, const Task& task, u32 warp, u32 lane,
                                   const float (&d)[2][N][4]) {
    const u32 g = lane / 4, c = lane % 4;
    const float alpha = p.scalars[task.expert].fc2_alpha;
    const u32 row = (task.block * BLOCK_TILES + warp) * 16 + g;
#pragma unroll
    for (u32 n = 0; n < N * 2; ++n) {
        const u32 token = n / 2 * 8 + 2 * c + n % 2;
        if (token >= task.count || warp >= task.tiles) continue;
        u16* term = p.terms + size_t(p.pairs[task.first + token].place) * p.hidden + row;
        const float low = __fadd_rn(d[0][n / 2][n % 2], d[1][n / 2][n % 2]);
        const float high = __fadd_rn(d[0][n / 2][2 + n % 2], d[1][n / 2][2 + n % 2]);
        term[0] = bf16_bits(__fmul_rn(alpha, low));
        term[8] = bf16_bits(__fmul_rn(alpha, high));
    }
}

template <u32 N>
__device__ inline void run(const Params& p, Ring& ring, Cursor& at, const Task& task, u32 warp,
                           u32 lane) {
    const u32 columns = task.phase == 0 ? p.hidden : p.intermediate;
    const u32 steps = unit_steps(columns);
    float d[2][N][4] = {};
    for (u32 n = 0; n < task.units; ++n) {
        barrier_wait(&ring.full[at.stage], at.parity);
        if (warp < task.tiles)
            multiply<N>(ring.stages[at.stage], warp, lane, steps, columns - n * steps * STEP_COLUMNS,
                        task.count, d);
        __syncwarp();
        if (lane == 0) barrier_arrive(&ring.empty[at.stage]);
        at.advance();
    }
    if (task.phase == 0) {
        finish_gate_up<N>(p, ring, task, warp, lane, d);
    } else {
        finish_down<N>(p, task, warp, lane, d);
    }
}

__device__ inline void consume(const Params& p, Ring& ring, u32 warp, u32 lane) {
    Cursor at;
    while (true) {
        barrier_wait(&ring.full[at.stage], at.parity);
        const Task task = ring.tasks[at.stage];
        if (task.phase == 2) return;
        if (task.count <= 8) {
            run<1>(p, ring, at, task, warp, lane);
        } else if (task.count <= 16) {
            run<2>(p, ring, at, task, warp, lane);
        } else {
            run<4>(p, ring, at, task, warp, lane);
        }
    }
}

extern "C" __global__ void __launch_bounds__(FUSED_THREADS, 1) fused_experts(const Params p) {
    extern __shared__ __align__(128) u8 memory[];
    Ring& ring = *reinterpret_cast<Ring*>(memory);
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (u32 stage = 0; stage < STAGES; ++stage) {
            barrier_init(&ring.full[stage], 1);
            barrier_init(&ring.empty[stage], MATHS_WARPS);
        }
        barrier_init_fence();
    }
    __syncthreads();
    if (warp == MATHS_WARPS) {
        produce(p, ring, lane);
    } else {
        consume(p, ring, warp, lane);
    }
}
