// A whole layer in one persistent launch: a block for each multiprocessor, one warp that copies and 16
// that multiply. The first block sorts the pairs, of a small call every copying warp for itself; when
// all are done, all sum terms. Blocks wait for one another, so the launch has them all resident.
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

// Lanes of a maths warp that say that it is done with a stage. One would do: the compiler leaves
// __syncwarp out where a warp is never apart, and only racecheck then misses the order of lanes.
#ifdef EVERY_LANE_ARRIVES
constexpr u32 ARRIVALS = 32;
#else
constexpr u32 ARRIVALS = 1;
#endif

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

// A task with what its end needs, brought along so that nobody waits for it then. Who is at the end of
// task n has freed its stages, and the copying warp is at task n + STAGES at most.
constexpr u32 SLOTS = STAGES + 1;
struct TaskSlot {
    Task task;
    Scalars scalars;
    u32 of_pair[JOB_TOKENS];  // FC1: its weight; FC2: its place
};

struct Ring {
    u8 stages[STAGES][STAGE_BYTES];
    float y[JOB_TOKENS][BLOCK_COLUMNS];
    u64 full[STAGES];
    u64 empty[STAGES];
    TaskSlot tasks[SLOTS];
};

// What the host counts on.
static_assert(FUSED_THREADS == HOST_THREADS && sizeof(Ring) <= HOST_SHARED, "launch");
static_assert(BLOCK_TILES == HOST_BLOCK_TILES && EXPERTS_MAX == HOST_EXPERTS_MAX, "layers");
static_assert(SMALL_PLACES == HOST_SMALL_PLACES && COUNTERS == HOST_COUNTERS, "control words");
static_assert(sizeof(Ring::y) >= EXPERTS_MAX * sizeof(u32), "the first block counts in y");

// Where in the ring a warp is.
struct Cursor {
    u32 stage = 0;
    u32 parity = 0;
    u32 slot = 0;
    __device__ void end_task() { slot = slot + 1 == SLOTS ? 0 : slot + 1; }
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

// Phase, job and block of a ticket. Tickets: FC1 of the first jobs; then by turns FC1 of a job and FC2
// of the one `lag` before it; then FC2 of the last jobs.
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
        if (task.job >= jobs) task.phase = 2;
    }
    return task;
}

// A task with what its lanes need, loaded while the task before it is copied.
struct Draft {
    Task task;
    Scalars scalars;  // lane 0
    Pair pair;        // of this lane
};

// Draws tickets, late enough that no block hoards work and early enough that none waits for it.
struct Tickets {
    u32 jobs;
    u32 ticket;  // lane 0
    bool given_up = false;
    Draft next;
    SmallCall small;
    __device__ Tickets(const Params& p, u32 lane) : ticket(blockIdx.x) {
        if (is_small(p)) {
            small.sort(p, lane);
            jobs = small.jobs();
        } else {
            auto routed = [&] { return load_acquire(&p.control[ROUTED]) == p.call; };
            const bool there = wait_for(p, ORDER, 0, routed);
            jobs = __all_sync(~0u, there) ? p.control[JOBS] : 0;
        }
        next = draft(p, ticket, lane);
    }
    __device__ Draft draft(const Params& p, u32 ticket, u32 lane) const {
        Draft draft = {};
        Task& task = draft.task;
        task = task_of(p, ticket, jobs);
        if (task.phase == 2) return draft;
        Job job;
        if (is_small(p)) {
            job = small.job(task.job);
            draft.pair = small.pair(p, job.reserved, lane);
        } else {
            job = p.jobs[task.job];
            if (lane < job.count) draft.pair = p.pairs[job.first + lane];
        }
        task.expert = job.expert;
        task.first = job.first;
        task.count = job.count;
        task.tiles = min(tiles_of(p, task.phase) - task.block * BLOCK_TILES, BLOCK_TILES);
        task.units = units_of(task.phase == 0 ? p.hidden : p.intermediate);
        if (lane == 0) draft.scalars = p.scalars[task.expert];
        return draft;
    }
    // Called before each stage of a task: the next ticket is asked for four stages before its end,
    // and its task two stages before.
    __device__ void at_stage(const Params& p, u32 stage, u32 stages, u32 lane) {
        if (stage == (stages > 4 ? stages - 4 : 0) && lane == 0)
            ticket = gridDim.x + atomicAdd(&p.control[TICKETS], 1u);
        if (stage == (stages > 2 ? stages - 2 : 0))
            next = draft(p, __shfl_sync(~0u, ticket, 0), lane);
    }
};

// Copies a task's stages. FC2 asks for its first weights before it waits for FC1.
__device__ inline void fill(const Params& p, Ring& ring, Cursor& at, Tickets& tickets, u32 lane) {
    const Draft draft = tickets.next;
    const Task task = draft.task;
    const u32 columns = task.phase == 0 ? p.hidden : p.intermediate;
    const u32 width = unit_steps(columns) * STEP_COLUMNS;
    const u32 bytes = task.tiles * unit_bytes(columns);
    const u8* weights = task.phase == 0 ? p.fc1 : p.fc2;
    weights += (size_t(task.expert) * tiles_of(p, task.phase) + task.block * BLOCK_TILES) *
               tile_bytes(columns);
    const u16* row = task.phase == 0 ? p.x + size_t(draft.pair.token) * columns
                                     : p.mid + size_t(task.first + lane) * columns;
    const u32 early = task.phase == 0 ? 1 : min(task.units, STAGES);
    Cursor rows = at;
    for (u32 n = 0; n < task.units; ++n) {
        tickets.at_stage(p, n, task.units, lane);
        barrier_wait(&ring.empty[at.stage], at.parity ^ 1);
        u64* full = &ring.full[at.stage];
        if (n == 0) {
            TaskSlot& slot = ring.tasks[at.slot];
            if (lane == 0) {
                slot.task = task;
                slot.scalars = draft.scalars;
            }
            if (lane < task.count)
                slot.of_pair[lane] =
                    task.phase == 0 ? __float_as_uint(draft.pair.weight) : draft.pair.place;
            __syncwarp();
        }
        if (lane == 0) {
            const u32 row_bytes = 2 * min(width, columns - n * width);
            barrier_arrive_expecting(full, bytes + task.count * row_bytes);
            copy_weights(ring.stages[at.stage], weights + size_t(n) * bytes, bytes, full);
        }
        __syncwarp();
        at.advance();
        if (n + 1 < early) continue;
        if (n + 1 == early && task.phase == 1) {
            auto done = [&] { return load_acquire(&p.counters[task.job]) >= tiles_of(p, 0); };
            const bool there = wait_for(p, GATE_UP, task.expert, done);
            proxy_fence();
            if (!__all_sync(~0u, there)) tickets.given_up = true;
        }
        for (u32 k = n + 1 == early ? 0 : n; k <= n; ++k) {
            if (lane < task.count)
                copy_row(ring.stages[rows.stage] + WEIGHT_BYTES + lane * ROW_BYTES, row + k * width,
                         2 * min(width, columns - k * width), &ring.full[rows.stage]);
            rows.advance();
        }
    }
    at.end_task();
}

__device__ inline void produce(const Params& p, Ring& ring, u32 lane) {
    Cursor at;
    Tickets tickets(p, lane);
    while (tickets.next.task.phase != 2 && !tickets.given_up) fill(p, ring, at, tickets, lane);
    barrier_wait(&ring.empty[at.stage], at.parity ^ 1);
    if (lane == 0) {
        ring.tasks[at.slot].task.phase = 2;
        barrier_arrive(&ring.full[at.stage]);
    }
}

__device__ inline void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Where a lane finds its part of any stage, from the stage's start.
struct Offsets {
    u32 codes;
    u32 scales;
    u32 rows;
    __device__ Offsets(u32 warp, u32 lane, u32 steps) {
        const u32 weights = warp * steps * (STEP_CODE_BYTES + STEP_COLUMNS);
        codes = kept(weights + lane * 16);
        scales = kept(weights + steps * STEP_CODE_BYTES + lane * steps * 2);
        rows = kept(WEIGHT_BYTES + lane / 4 * ROW_BYTES + lane % 4 * 2 * BLOCK);
    }
};

// Steps whose tokens are in registers at a time.
template <u32 N, u32 STEPS>
constexpr u32 SETS = N == 4 || STEPS == 1 ? 1 : 2;

// One stage of STEPS steps: this warp's tile times N tiles of 8 tokens. Words of even and odd number
// are summed apart, so that additions do not wait for one another; the two sums meet at the end.
// `x` is zero for tokens that are not there, and stays so: zeros draw less power.
template <u32 N, u32 STEPS>
__device__ inline void multiply(u32 stage, const Offsets& offsets, u32 there,
                                uint4 (&x)[SETS<N, STEPS>][N][2], float (&d)[2][N][4]) {
    uint2 scales = {};
    if (STEPS == WIDE_STEPS) {
        scales = load8(stage + offsets.scales);
    } else {
        scales.x = load2(stage + offsets.scales);
    }
    constexpr u32 AT_ONCE = N == 1 ? STEPS : SETS<N, STEPS>;
#pragma unroll AT_ONCE
    for (u32 step = 0; step < STEPS; ++step) {
        const uint4 codes = load16(stage + offsets.codes + step * STEP_CODE_BYTES);
        auto& now = x[step % SETS<N, STEPS>];
#pragma unroll
        for (u32 n = 0; n < N; ++n) {
            const u32 from = stage + offsets.rows + n * 8 * ROW_BYTES + step * 2 * STEP_COLUMNS;
            load16_if(now[n][0], from, there >> n & 1);
            load16_if(now[n][1], from + 16, there >> n & 1);
        }
        const u32 word = step < 2 ? scales.x : scales.y;
        const u32 low = scale_pair(word, step % 2 * 2), high = scale_pair(word, step % 2 * 2 + 1);
        u32 a[2][4];
        decode(codes.x, codes.y, low, high, a);
#pragma unroll
        for (u32 n = 0; n < N; ++n) {
            mma(d[0][n], a[0], now[n][0].x, now[n][0].y);
            mma(d[1][n], a[1], now[n][0].z, now[n][0].w);
        }
        decode(codes.z, codes.w, low, high, a);
#pragma unroll
        for (u32 n = 0; n < N; ++n) {
            mma(d[0][n], a[0], now[n][1].x, now[n][1].y);
            mma(d[1][n], a[1], now[n][1].z, now[n][1].w);
        }
    }
}

// `fast` is within some units of the last place of fp32, of which bf16 keeps nothing; quantisers need them all, because
// they round at midpoints that values meet exactly.
__device__ inline float activate(const Params& p, float gate, float up, bool fast = false) {
    // Not fminf and fmaxf, which would turn a NaN into a number.
    gate = gate > p.limit ? p.limit : gate;
    up = up > p.limit ? p.limit : (up < -p.limit ? -p.limit : up);
    const float power = -__fmul_rn(p.alpha, gate);
    const float sigmoid = fast ? __fdividef(1.0f, 1.0f + __expf(power))
                               : __fdiv_rn(1.0f, 1.0f + expf(power));
    return __fmul_rn(__fmul_rn(__fadd_rn(up, p.beta), gate), sigmoid);
}

// act=nvfp4: the block's columns of the intermediate, from shared memory.
__device__ inline void quantise_block(const Params& p, Ring& ring, const Task& task,
                                      float norm_const, u32 thread) {
    maths_sync(MATHS_WARPS * 32);
    const u32 blocks = task.tiles / 2;
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

// The end of FC1: its columns of the intermediate. The caller says that they are there.
template <u32 N>
__device__ inline void finish_gate_up(const Params& p, Ring& ring, const TaskSlot& slot, u32 warp,
                                      u32 lane, const float (&d)[2][N][4]) {
    const u32 g = lane / 4, c = lane % 4;
    const Task& task = slot.task;
    const Scalars scalars = slot.scalars;
    const u32 count = warp < task.tiles ? task.count : 0, column = warp * 8 + g;
    u16* mid = p.mid + size_t(task.first) * p.intermediate + task.block * BLOCK_COLUMNS + column;
#pragma unroll
    for (u32 n = 0; n < N * 2; ++n) {
        const u32 token = n / 2 * 8 + 2 * c + n % 2;
        if (token >= count) continue;
        const float gate = __fadd_rn(d[0][n / 2][n % 2], d[1][n / 2][n % 2]);
        const float up = __fadd_rn(d[0][n / 2][2 + n % 2], d[1][n / 2][2 + n % 2]);
        float y = activate(p, __fmul_rn(scalars.gate_alpha, gate), __fmul_rn(scalars.up_alpha, up));
        if (!p.weights_in_combine) y = __fmul_rn(y, __uint_as_float(slot.of_pair[token]));
        if (p.quantised) {
            ring.y[token][column] = y;
        } else {
            mid[size_t(token) * p.intermediate] = bf16_bits(y);
        }
    }
    if (p.quantised) {
        quantise_block(p, ring, task, scalars.norm_const, warp * 32 + lane);
    } else {
        proxy_fence();
    }
}

// The end of FC2: bf16 terms at their places.
template <u32 N>
__device__ inline void finish_down(const Params& p, const TaskSlot& slot, u32 warp, u32 lane,
                                   const float (&d)[2][N][4]) {
    const u32 g = lane / 4, c = lane % 4;
    const Task& task = slot.task;
    const float alpha = slot.scalars.fc2_alpha;
    const u32 count = warp < task.tiles ? task.count : 0;
    u16* terms = p.terms + (task.block * BLOCK_TILES + warp) * 16 + g;
#pragma unroll
    for (u32 n = 0; n < N * 2; ++n) {
        const u32 token = n / 2 * 8 + 2 * c + n % 2;
        if (token >= count) continue;
        u16* term = terms + size_t(slot.of_pair[token]) * p.hidden;
        const float low = __fadd_rn(d[0][n / 2][n % 2], d[1][n / 2][n % 2]);
        const float high = __fadd_rn(d[0][n / 2][2 + n % 2], d[1][n / 2][2 + n % 2]);
        term[0] = bf16_bits(__fmul_rn(alpha, low));
        term[8] = bf16_bits(__fmul_rn(alpha, high));
    }
}

// A job of which this warp's tile of FC1 is written and not yet announced: the announcement waits for
// the writes, so it is made after the next stage, unless nothing is there to be done meanwhile.
struct Announcement {
    static constexpr u32 NONE = ~0u;
    u32 job = NONE;
    __device__ void make(const Params& p, u32 lane) {
        if (job == NONE) return;
        __syncwarp();
        if (lane == 0 && WITHHELD != GATE_UP) add_release(&p.counters[job], 1);
        job = NONE;
    }
};

template <u32 N, u32 STEPS>
__device__ inline void run(const Params& p, Ring& ring, u32 memory, Cursor& at,
                           Announcement& announcement, u32 warp, u32 lane) {
    const TaskSlot& slot = ring.tasks[at.slot];
    const u32 phase = slot.task.phase, units = slot.task.units, count = slot.task.count;
    const u32 columns = phase == 0 ? p.hidden : p.intermediate;
    const Offsets offsets(warp, lane, STEPS);
    const u32 full_barriers = memory + (shared_address(ring.full) - shared_address(&ring));
    const bool arrives = lane < ARRIVALS, works = warp < slot.task.tiles;
    u32 there = 0;
#pragma unroll
    for (u32 n = 0; n < N; ++n) there |= u32(n * 8 + lane / 4 < count) << n;
    there = kept(there);
    float d[2][N][4] = {};
    uint4 x[SETS<N, STEPS>][N][2] = {};
    for (u32 n = 0; n < units; ++n) {
        const u32 full = full_barriers + at.stage * 8;
        const u32 token = barrier_wait_token(full, at.parity);
        if (works) {
            // What lies past the columns was never written. Units of four steps end where they do.
            if (STEPS == 1 && n * STEP_COLUMNS + lane % 4 * BLOCK >= columns) {
                there = 0;
                for (u32 k = 0; k < N; ++k) x[0][k][0] = x[0][k][1] = uint4{};
            }
            multiply<N, STEPS>(memory + at.stage * STAGE_BYTES + token, offsets, there, x, d);
        }
        // Products that are done have loaded all that they take, and a product is a whole warp's.
#pragma unroll
        for (u32 k = 0; k < N; ++k) done_with(d[0][k][0], d[1][k][0]);
        __syncwarp();
        arrive_if(full + u32((ring.empty - ring.full) * sizeof(u64)), arrives);
        at.advance();
        announcement.make(p, lane);
    }
    if (phase == 0) {
        finish_gate_up<N>(p, ring, slot, warp, lane, d);
        if (works) announcement.job = slot.task.job;
    } else {
        finish_down<N>(p, slot, warp, lane, d);
    }
    at.end_task();
}

template <u32 STEPS>
__device__ inline void run_task(const Params& p, Ring& ring, u32 memory, Cursor& at,
                                Announcement& announcement, u32 count, u32 warp, u32 lane) {
    if (count <= 8) {
        run<1, STEPS>(p, ring, memory, at, announcement, warp, lane);
    } else if (count <= 16) {
        run<2, STEPS>(p, ring, memory, at, announcement, warp, lane);
    } else {
        run<4, STEPS>(p, ring, memory, at, announcement, warp, lane);
    }
}

// The sum of terms, when all blocks have written theirs. One thread says so and one looks: 16 times as
// many would get in one another's way. Few tokens are a share of few blocks; the others do not wait.
__device__ inline void combine_together(const Params& p, u32 warp, u32 lane) {
    const bool first = warp == 0 && lane == 0;
    maths_sync(MATHS_WARPS * 32);
    if (first && WITHHELD != OTHERS) add_release(&p.control[FINISHED], 1);
    if (blockIdx.x * 32 >= combine_steps(p)) return;
    auto finished = [&] { return load_acquire(&p.control[FINISHED]) >= gridDim.x; };
    if (first) wait_for(p, OTHERS, 0, finished);
    maths_sync(MATHS_WARPS * 32);
    combine_share(p, (warp * gridDim.x + blockIdx.x) * 32 + lane, gridDim.x * MATHS_WARPS * 32);
}

// The last block leaves everything as the next launch wants it. Called when no thread of this block
// looks at words of control any more.
__device__ inline void leave(const Params& p) {
    if (atomicAdd(&p.control[LEFT], 1u) != gridDim.x - 1) return;
    *p.status = load_acquire(&p.control[EXPIRED]);
    p.control[TICKETS] = p.control[FINISHED] = p.control[LEFT] = p.control[EXPIRED] = 0;
    for (u32 job = 0; job < SMALL_PLACES; ++job) p.control[COUNTERS + job] = 0;
}

__device__ inline void consume(const Params& p, Ring& ring, u32 warp, u32 lane) {
    const u32 memory = kept_uniform(shared_address(&ring));
    Cursor at;
    Announcement announcement;
    while (true) {
        u64* full = &ring.full[at.stage];
        if (!__all_sync(~0u, barrier_test(full, at.parity))) announcement.make(p, lane);
        barrier_wait(full, at.parity);
        const Task& task = ring.tasks[at.slot].task;
        const u32 phase = task.phase, count = task.count;
        if (phase == 2) break;
        if (unit_steps(phase == 0 ? p.hidden : p.intermediate) == WIDE_STEPS) {
            run_task<WIDE_STEPS>(p, ring, memory, at, announcement, count, warp, lane);
        } else {
            run_task<1>(p, ring, memory, at, announcement, count, warp, lane);
        }
    }
    announcement.make(p, lane);
    combine_together(p, warp, lane);
}

extern "C" __global__ void __launch_bounds__(FUSED_THREADS, 1) fused_moe(const Params p) {
    extern __shared__ __align__(128) u8 memory[];
    Ring& ring = *reinterpret_cast<Ring*>(memory);
    const u32 warp = kept_uniform(threadIdx.x / 32), lane = kept(threadIdx.x % 32);
    if (threadIdx.x == 0) {
        for (u32 stage = 0; stage < STAGES; ++stage) {
            barrier_init(&ring.full[stage], 1);
            barrier_init(&ring.empty[stage], MATHS_WARPS * ARRIVALS);
        }
        barrier_init_fence();
    }
    if (blockIdx.x == 0 && !is_small(p)) route(p, reinterpret_cast<u32*>(&ring.y));
    __syncthreads();
    if (warp == MATHS_WARPS) {
        produce(p, ring, lane);
    } else {
        consume(p, ring, warp, lane);
    }
    __syncthreads();
    if (threadIdx.x == 0) leave(p);
}
