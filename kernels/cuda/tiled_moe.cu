// FC1 or FC2 of many tokens: one persistent block on each multiprocessor, two threads that ask for copies and two
// warpgroups that multiply. A task is 128 rows of weights (half a row block) times a tile of up to 256 tokens, over all
// columns: each warpgroup has 64 rows, decodes them into registers, and takes the tokens out of shared memory. While its
// products of a step run, it decodes the next step.
//
// Every output is one sum in the order of the columns' steps, so no bit depends on what shares the tile.

constexpr u32 TASK_TILES = 8;
constexpr u32 TILED_MATHS = 256;
constexpr u32 TILED_THREADS = TILED_MATHS + 128;
constexpr u32 TOKEN_STAGES = 4;
constexpr u32 WEIGHT_STAGES = 3;
constexpr u32 TASK_UNIT_BYTES = TASK_TILES * WIDE_STEPS * (STEP_CODE_BYTES + STEP_COLUMNS);

struct TiledTask {
    Tile tile;
    u32 part;   // which 128 rows
    u32 tiles;  // of 16 rows; 0 is the end
};

// Tasks that may be drawn and not done.
constexpr u32 TASK_STAGES = 3;

// Of tiles of up to TILE tokens.
template <u32 TILE>
struct TiledRing {
    // Tokens whose sums leave at a time, of each warpgroup.
    static constexpr u32 ROUND = TILE < 128 ? TILE : 128;
    u8 tokens[TOKEN_STAGES][TILE * ROW];
    u8 staged[2 * ROUND * ROW];
    u8 weights[WEIGHT_STAGES][TASK_UNIT_BYTES];
    u32 of_pair[2][2][TILE];  // of each warpgroup, of this task and the one before: FC1: weights; FC2: places
    u64 tokens_full[TOKEN_STAGES];
    u64 tokens_empty[TOKEN_STAGES];
    u64 weights_full[WEIGHT_STAGES];
    u64 weights_empty[WEIGHT_STAGES];
    u64 tasks_full[TASK_STAGES];
    u64 tasks_empty[TASK_STAGES];
    u64 staged_full;
    u64 staged_empty;
    TiledTask tasks[TASK_STAGES];
};

static_assert(TILED_THREADS == HOST_TILED_THREADS, "launch");
static_assert(sizeof(TiledRing<HOST_WIDE_TILE>) <= HOST_WIDE_SHARED, "launch");
static_assert(sizeof(TiledRing<HOST_NARROW_TILE>) <= HOST_NARROW_SHARED, "launch");
static_assert(SORT_THREADS == HOST_SORT_THREADS && SORTED_PLACES == HOST_SORTED_PLACES, "sorts");

template <u32 STAGES_OF_RING>
struct RingCursor {
    u32 stage = 0;
    u32 parity = 0;
    __device__ void advance() {
        if (++stage == STAGES_OF_RING) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// The next task, once it is drawn.
template <u32 TILE>
__device__ inline const TiledTask& next_task(TiledRing<TILE>& ring, const RingCursor<TASK_STAGES>& at) {
    barrier_wait(&ring.tasks_full[at.stage], at.parity);
    return ring.tasks[at.stage];
}

// One thread draws tasks, and copies their weights, as far ahead as there is room: they come from memory that is far.
template <u32 PHASE, u32 TILE>
__device__ inline void copy_all_weights(const Params& p, TiledRing<TILE>& ring) {
    const u32 columns = PHASE == 0 ? p.hidden : p.intermediate;
    const u32 tiles = tiles_of(p, PHASE), parts = (tiles + TASK_TILES - 1) / TASK_TILES;
    const u32 units = units_of(columns), unit = unit_bytes(columns);
    const u32 total = p.control[JOBS] * parts;
    RingCursor<WEIGHT_STAGES> at;
    RingCursor<TASK_STAGES> drawn;
    u32 ticket = blockIdx.x;
    while (true) {
        barrier_wait(&ring.tasks_empty[drawn.stage], drawn.parity ^ 1);
        TiledTask& task = ring.tasks[drawn.stage];
        u64* full = &ring.tasks_full[drawn.stage];
        drawn.advance();
        if (ticket >= total) {
            task.tiles = 0;
            barrier_arrive(full);
            break;
        }
        const u32 next = gridDim.x + atomicAdd(&p.control[TILE_TICKETS + PHASE], 1u);
        const u32 part = ticket % parts, block = part * TASK_TILES / BLOCK_TILES;
        const u32 block_tiles = min(tiles - block * BLOCK_TILES, BLOCK_TILES);
        const u32 bytes = min(tiles - part * TASK_TILES, TASK_TILES) * unit;
        const Tile tile = p.tiles[ticket / parts];
        task = {tile, part, bytes / unit};
        barrier_arrive(full);
        const u8* weights = PHASE == 0 ? p.fc1 : p.fc2;
        weights += (size_t(tile.expert) * tiles + block * BLOCK_TILES) * tile_bytes(columns) +
                   part * TASK_TILES % BLOCK_TILES * unit;
        for (u32 n = 0; n < units; ++n) {
            barrier_wait(&ring.weights_empty[at.stage], at.parity ^ 1);
            u64* there = &ring.weights_full[at.stage];
            barrier_arrive_expecting(there, bytes);
            copy_weights(ring.weights[at.stage], weights + size_t(n) * block_tiles * unit, bytes,
                         there);
            at.advance();
        }
        ticket = next;
    }
}

// Another copies the tokens.
template <u32 PHASE, u32 TILE>
__device__ inline void copy_all_tokens(const Params& p, TiledRing<TILE>& ring) {
    const u32 steps = steps_of(PHASE == 0 ? p.hidden : p.intermediate);
    const u8* pool = PHASE == 0 ? p.pool : reinterpret_cast<const u8*>(p.mid);
    RingCursor<TOKEN_STAGES> at;
    RingCursor<TASK_STAGES> drawn;
    while (true) {
        const TiledTask task = next_task(ring, drawn);
        barrier_arrive(&ring.tasks_empty[drawn.stage]);
        drawn.advance();
        if (task.tiles == 0) break;
        const u32 bytes = task.tile.rows * ROW;
        for (u32 step = 0; step < steps; ++step) {
            barrier_wait(&ring.tokens_empty[at.stage], at.parity ^ 1);
            u64* there = &ring.tokens_full[at.stage];
            barrier_arrive_expecting(there, bytes);
            copy_row(ring.tokens[at.stage], pool + tile_step(task.tile, steps, step), bytes, there);
            at.advance();
        }
    }
}

// FC1: a third takes what the warpgroups have staged out to the intermediate, so that they need not wait for each other.
template <u32 TILE>
__device__ inline void copy_all_staged(const Params& p, TiledRing<TILE>& ring) {
    RingCursor<TASK_STAGES> drawn;
    for (u32 parity = 0;; parity ^= 1) {
        const TiledTask task = next_task(ring, drawn);
        barrier_arrive(&ring.tasks_empty[drawn.stage]);
        drawn.advance();
        if (task.tiles == 0) break;
        barrier_wait(&ring.staged_full, parity);
        if (!p.quantised)
            copy_out(reinterpret_cast<u8*>(p.mid) +
                         tile_step(task.tile, steps_of(p.intermediate), task.part),
                     ring.staged, task.tile.rows * ROW);
        copied_out();
        barrier_arrive(&ring.staged_empty);
    }
    copied_out_whole();
}

// A maths warp's place in the rings.
struct TiledCursor {
    RingCursor<TOKEN_STAGES> rows;
    RingCursor<WEIGHT_STAGES> weights;
    RingCursor<TASK_STAGES> task;
    u32 odd = 0;  // whether the number of the task is
};

// What a lane decodes of a step of its warp's tile.
struct Raw {
    uint4 codes;
    u32 scales;
};

__device__ inline Raw load_raw(u32 unit, u32 lane, u32 wide, u32 step) {
    return {load16(unit + step * STEP_CODE_BYTES + lane * 16),
            load2(unit + wide * STEP_CODE_BYTES + (lane * wide + step) * 2)};
}

// The A fragments of a step.
__device__ inline void decode_step(const Raw& raw, u32 (&a)[4][4]) {
    const u32 low = scale_pair(raw.scales, 0), high = scale_pair(raw.scales, 1);
    decode(raw.codes.x, raw.codes.y, low, high, *reinterpret_cast<u32(*)[2][4]>(&a[0]));
    decode(raw.codes.z, raw.codes.w, low, high, *reinterpret_cast<u32(*)[2][4]>(&a[2]));
}

template <u32 N, u32 SUMS>
__device__ inline void add_step(float (&d)[SUMS], const u32 (&a)[4][4], u64 tokens) {
    products_fence();
#pragma unroll
    for (u32 k = 0; k < 4; ++k) Product<N>::add(d, a[k], tokens + 2 * k);
}

// A step's products with a tile of at most MOST rows: as few columns as there are rows, rounded up. Few ways for each
// MOST: they are looked through in every step. One loop for each number of columns would be too much for the assembler,
// which then lets products wait for one another.
template <u32 MOST, u32 SUMS>
__device__ inline void add_step(float (&d)[SUMS], const u32 (&a)[4][4], u64 tokens, u32 rows) {
    if constexpr (MOST == 256) {
        if (rows > 240) add_step<256>(d, a, tokens);
        else if (rows > 224) add_step<240>(d, a, tokens);
        else if (rows > 192) add_step<224>(d, a, tokens);
        else add_step<192>(d, a, tokens);
    } else if constexpr (MOST == 160) {
        if (rows <= 96) add_step<96>(d, a, tokens);
        else if (rows <= 128) add_step<128>(d, a, tokens);
        else if (rows <= 144) add_step<144>(d, a, tokens);
        else add_step<160>(d, a, tokens);
    } else {
        if (rows <= 16) add_step<16>(d, a, tokens);
        else if (rows <= 32) add_step<32>(d, a, tokens);
        else if (rows <= 40) add_step<40>(d, a, tokens);
        else if (rows <= 48) add_step<48>(d, a, tokens);
        else add_step<64>(d, a, tokens);
    }
}

// Sums a task's products. `warp` counts those that multiply; one without a tile multiplies what lies in its place, for
// nobody. While a step's products run, the next step is decoded, and the codes of the one after it are on their way.
template <u32 MOST, u32 STEPS, u32 TILE>
__device__ inline void accumulate(TiledRing<TILE>& ring, TiledCursor& at, u32 units, u32 rows,
                                  u32 warp, u32 lane, float (&d)[TILE / 2]) {
    const u32 own = warp * STEPS * (STEP_CODE_BYTES + STEP_COLUMNS);
    const bool arrives = lane < ARRIVALS;
    u32 a[2][4][4];
    const u32 first = barrier_wait_token(shared_address(&ring.weights_full[at.weights.stage]),
                                         at.weights.parity);
    u32 unit = shared_address(ring.weights[at.weights.stage]) + own + first;
    decode_step(load_raw(unit, lane, STEPS, 0), a[0]);
    u32 before = ~0u;  // the barrier of the stage of tokens of the products that run
    for (u32 n = 0; n < units; ++n) {
#pragma unroll
        for (u32 step = 0; step < STEPS; ++step) {
            Raw next;
            if (step + 1 < STEPS) {
                next = load_raw(unit, lane, STEPS, step + 1);
            } else {
                // What was read of it is in registers.
#pragma unroll
                for (u32 k = 0; k < 4; ++k) taken(a[step % 2][k]);
                __syncwarp();
                arrive_if(shared_address(&ring.weights_empty[at.weights.stage]), arrives);
                at.weights.advance();
                if (n + 1 < units) {
                    u64* full = &ring.weights_full[at.weights.stage];
                    const u32 token = barrier_wait_token(shared_address(full), at.weights.parity);
                    unit = shared_address(ring.weights[at.weights.stage]) + own + token;
                    next = load_raw(unit, lane, STEPS, 0);
                }
            }
            const u32 stage = at.rows.stage;
            barrier_wait(&ring.tokens_full[stage], at.rows.parity);
            add_step<MOST>(d, a[step % 2], describe_rows(shared_address(ring.tokens[stage])), rows);
            products_commit();
            // One buffer where a unit is a step.
            if (STEPS == 1) {
                products_wait<0>();
            } else {
                products_wait<1>();
            }
            if (before != ~0u) arrive_if(before, arrives);
            before = shared_address(&ring.tokens_empty[stage]);
            at.rows.advance();
            if (step + 1 < STEPS || n + 1 < units)
                decode_step(next, a[STEPS == 1 ? 0 : (step + 1) % 2]);
        }
    }
    products_wait<0>();
    sums_ready(d);
    if (before != ~0u) arrive_if(before, arrives);
}

// A barrier of one warpgroup.
__device__ inline void group_sync(u32 group) {
    asm volatile("bar.sync %0, 128;" ::"r"(2 + group) : "memory");
}

// Of two columns g and g + 1, an even one and the next, and two tokens: the even lane gets both columns of the first,
// the odd one both of the second.
__device__ inline u32 columns_of_token(u32 g, u32 first, u32 second) {
    const bool odd = g % 2 != 0;
    const u32 other = __shfl_xor_sync(~0u, odd ? first : second, 4);
    return odd ? other | second << 16 : first | other << 16;
}

// act=nvfp4: quantises `tokens` tokens from `first` on out of shared memory into a step of the intermediate.
__device__ __noinline__ void quantise_round(const Tile& tile, const float* staged, u8* mid,
                                            float norm_const, uint2 first_tokens, u32 thread) {
    const u32 first = first_tokens.x;
    maths_sync(TILED_MATHS);
    for (u32 n = thread; n < first_tokens.y * STEP_BLOCKS; n += TILED_MATHS) {
        const u32 token = first + n / STEP_BLOCKS, block = n % STEP_BLOCKS;
        if (token >= tile.count) continue;
        float y[BLOCK];
        for (u32 k = 0; k < BLOCK; ++k)
            y[k] = staged[n / STEP_BLOCKS * STEP_COLUMNS + block * BLOCK + k];
        requantise(y, norm_const);
        for (u32 k = 0; k < BLOCK; k += 2)
            *reinterpret_cast<u32*>(mid + token * ROW + column_byte(token, block * BLOCK + k)) =
                bf16_bits(y[k]) | u32(bf16_bits(y[k + 1])) << 16;
    }
    maths_sync(TILED_MATHS);
}

// The end of FC1: a step of the intermediate, in the order of the pool.
template <u32 TILE>
__device__ inline void finish_tiled_gate_up(const Params& p, TiledRing<TILE>& ring,
                                            const TiledTask& task, u32 odd, u32 warp, u32 lane,
                                            const float (&d)[TILE / 2]) {
    const u32* weights = ring.of_pair[warp / 4][odd];
    const u32 g = lane / 4, c = lane % 4, column = warp * 8 + g, thread = warp * 32 + lane;
    const Scalars scalars = p.scalars[task.tile.expert];
    const bool works = warp < task.tiles;
    u8* mid = reinterpret_cast<u8*>(p.mid) +
              tile_step(task.tile, steps_of(p.intermediate), task.part);
    auto value = [&](u32 j, u32 e, bool fast) {
        const u32 token = 8 * j + 2 * c + e;
        const float y = activate(p, __fmul_rn(scalars.gate_alpha, d[4 * j + e]),
                                 __fmul_rn(scalars.up_alpha, d[4 * j + 2 + e]), fast);
        return p.weights_in_combine ? y : __fmul_rn(y, __uint_as_float(weights[token]));
    };
    group_sync(warp / 4);
    barrier_wait(&ring.staged_empty, odd ^ 1);
    // Rows beyond the pairs get numbers of no meaning, and so do columns beyond the last tile.
    if (!p.quantised) {
#pragma unroll
        for (u32 j = 0; j < TILE / 8; ++j) {
            if (j * 8 >= task.tile.rows) break;
            const u32 word = columns_of_token(g, bf16_bits(works ? value(j, 0, true) : 0.0f),
                                              bf16_bits(works ? value(j, 1, true) : 0.0f));
            const u32 row = 8 * j + 2 * c + g % 2;
            store4(shared_address(ring.staged) + row * ROW + column_byte(row, column & ~1u), word);
        }
        proxy_fence();
        __syncwarp();
        if (lane < ARRIVALS) barrier_arrive(&ring.staged_full);
        return;
    }
    maths_sync(TILED_MATHS);
    constexpr u32 ROUND = TiledRing<TILE>::ROUND;
    float* staged = reinterpret_cast<float*>(ring.staged) + column;
#pragma unroll
    for (u32 j = 0; j < TILE / 8; ++j) {
        if (j * 8 >= task.tile.rows) break;
        float* at = staged + (8 * j + 2 * c) % ROUND * STEP_COLUMNS;
        at[0] = works ? value(j, 0, false) : 0.0f;
        at[STEP_COLUMNS] = works ? value(j, 1, false) : 0.0f;
        if ((j + 1) * 8 == task.tile.rows || (j + 1) * 8 % ROUND == 0)
            quantise_round(task.tile, reinterpret_cast<float*>(ring.staged), mid,
                           scalars.norm_const, {j * 8 / ROUND * ROUND, ROUND}, thread);
    }
    if (lane < ARRIVALS) barrier_arrive(&ring.staged_full);
}

// The end of FC2: bf16 terms at their places.
template <u32 TILE>
__device__ inline void finish_tiled_down(const Params& p, TiledRing<TILE>& ring,
                                         const TiledTask& task, u32 odd, u32 warp, u32 lane,
                                         const float (&d)[TILE / 2]) {
    const u32 g = lane / 4, c = lane % 4, group = warp / 4;
    const float alpha = p.scalars[task.tile.expert].fc2_alpha;
    constexpr u32 ROUND = TiledRing<TILE>::ROUND;
    const u32* places = ring.of_pair[group][odd];
    u8* staged = ring.staged + group * ROUND * ROW;
#pragma unroll
    for (u32 round = 0; round < TILE / ROUND; ++round) {
        if (round * ROUND >= task.tile.rows) break;
        group_sync(group);
#pragma unroll
        for (u32 j = round * ROUND / 8; j < (round + 1) * ROUND / 8; ++j) {
            if (j * 8 >= task.tile.rows) break;
#pragma unroll
            for (u32 half = 0; half < 2; ++half) {
                const float* sums = d + 4 * j + 2 * half;
                const u32 word = columns_of_token(g, bf16_bits(__fmul_rn(alpha, sums[0])),
                                                  bf16_bits(__fmul_rn(alpha, sums[1])));
                const u32 row = 8 * j + 2 * c + g % 2 - round * ROUND;
                const u32 chunk = warp % 4 * 2 + half;
                store4(shared_address(staged) + row * ROW + ((chunk ^ row % 8) << 4) + g / 2 * 4,
                       word);
            }
        }
        group_sync(group);
        const u32 rows = min(task.tile.count - min(task.tile.count, round * ROUND), ROUND);
        for (u32 n = warp % 4 * 32 + lane; n < rows * 8; n += 128) {
            const u32 row = n / 8, chunk = n % 8;
            const u32 column = (task.part * TASK_TILES + group * 4) * 16 + chunk * 8;
            if (column >= p.hidden) continue;
            const uint4 from = *reinterpret_cast<const uint4*>(staged + row * ROW +
                                                               ((chunk ^ row % 8) << 4));
            u16* term = p.terms + size_t(places[round * ROUND + row]) * p.hidden + column;
            *reinterpret_cast<uint4*>(term) = from;
        }
    }
}

template <u32 PHASE, u32 TILE>
__device__ inline void consume_tiled(const Params& p, TiledRing<TILE>& ring, u32 warp, u32 lane) {
    const u32 columns = PHASE == 0 ? p.hidden : p.intermediate;
    const u32 units = units_of(columns);
    TiledCursor at;
    while (true) {
        const TiledTask& task = next_task(ring, at.task);
        if (task.tiles == 0) break;
        const u32 rows = task.tile.rows;
        for (u32 n = warp % 4 * 32 + lane; n < task.tile.count; n += 128) {
            const Pair pair = p.pairs[task.tile.first + n];
            ring.of_pair[warp / 4][at.odd][n] = PHASE == 0 ? __float_as_uint(pair.weight) : pair.place;
        }
        float d[TILE / 2] = {};
        if constexpr (TILE == HOST_NARROW_TILE) {
            if (unit_steps(columns) != WIDE_STEPS) {
                accumulate<64, 1>(ring, at, units, rows, warp, lane, d);
            } else {
                accumulate<64, WIDE_STEPS>(ring, at, units, rows, warp, lane, d);
            }
        } else if (unit_steps(columns) != WIDE_STEPS) {
            accumulate<256, 1>(ring, at, units, rows, warp, lane, d);
        } else if (rows > 160) {
            accumulate<256, WIDE_STEPS>(ring, at, units, rows, warp, lane, d);
        } else if (rows > 64) {
            accumulate<160, WIDE_STEPS>(ring, at, units, rows, warp, lane, d);
        } else {
            accumulate<64, WIDE_STEPS>(ring, at, units, rows, warp, lane, d);
        }
        if (PHASE == 0) {
            finish_tiled_gate_up(p, ring, task, at.odd, warp, lane, d);
        } else {
            finish_tiled_down(p, ring, task, at.odd, warp, lane, d);
        }
        __syncwarp();
        if (lane < ARRIVALS) barrier_arrive(&ring.tasks_empty[at.task.stage]);
        at.task.advance();
        at.odd ^= 1;
    }
}

// Threads that copy get few registers, those that multiply the others.
template <u32 PHASE, u32 TILE, u32 FEW, u32 MANY>
__device__ inline void tiled(const Params& p, u8* memory) {
    TiledRing<TILE>& ring = *reinterpret_cast<TiledRing<TILE>*>(memory);
    constexpr u32 MATHS = TILED_MATHS / 32 * ARRIVALS, COPIERS = PHASE == 0 ? 2 : 1;
    if (threadIdx.x == 0) {
        for (u32 stage = 0; stage < TOKEN_STAGES; ++stage) {
            barrier_init(&ring.tokens_full[stage], 1);
            barrier_init(&ring.tokens_empty[stage], MATHS);
        }
        for (u32 stage = 0; stage < WEIGHT_STAGES; ++stage) {
            barrier_init(&ring.weights_full[stage], 1);
            barrier_init(&ring.weights_empty[stage], MATHS);
        }
        for (u32 stage = 0; stage < TASK_STAGES; ++stage) {
            barrier_init(&ring.tasks_full[stage], 1);
            barrier_init(&ring.tasks_empty[stage], MATHS + COPIERS);
        }
        barrier_init(&ring.staged_full, MATHS);
        barrier_init(&ring.staged_empty, 1);
        barrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x >= TILED_MATHS) {
        registers_give<FEW>();
        if (threadIdx.x == TILED_MATHS) copy_all_weights<PHASE>(p, ring);
        if (threadIdx.x == TILED_MATHS + 32) copy_all_tokens<PHASE>(p, ring);
        if (PHASE == 0 && threadIdx.x == TILED_MATHS + 64) copy_all_staged(p, ring);
    } else {
        registers_take<MANY>();
        consume_tiled<PHASE>(p, ring, threadIdx.x / 32, threadIdx.x % 32);
    }
}

#define TILED_KERNEL(name, phase, tile, blocks, few, many)                                    \
    extern "C" __global__ void __launch_bounds__(TILED_THREADS, blocks) name(const Params p) { \
        extern __shared__ __align__(1024) u8 tiled_memory[];                                  \
        tiled<phase, tile, few, many>(p, tiled_memory);                                       \
    }

TILED_KERNEL(wide_gate_up, 0, HOST_WIDE_TILE, 1, 56, 224)
TILED_KERNEL(wide_down, 1, HOST_WIDE_TILE, 1, 56, 224)
TILED_KERNEL(narrow_gate_up, 0, HOST_NARROW_TILE, 2, 40, 96)
TILED_KERNEL(narrow_down, 1, HOST_NARROW_TILE, 2, 40, 96)
