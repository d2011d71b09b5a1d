// The pool of tokens of a tiled call: pairs by expert, cut into tiles of up to `tile_tokens`, each in the order in which
// wgmma takes it. Both the tokens and the intermediate lie so:
//
//   tile   [steps of 64 columns][rows] row of 128 bytes; rows are the pairs, rounded up to 8
//   row    8 chunks of 16 bytes, chunk q at place q ^ (row % 8)
//   chunk  words (pairs of columns) q, q + 8, q + 16, q + 24 of the 64 columns: the order of the weights' K, in which
//          the A fragments of a step have four words of each block of 16
//
// Rows beyond the pairs hold whatever they held: products of rows do not meet.

constexpr u32 ROW = 128;
constexpr u32 ROWS_STEP = 8;

// Pairs of one expert that are multiplied together.
struct Tile {
    u32 expert;
    u32 first;  // row of the pool, a multiple of 8
    u32 count;
    u32 rows;
};

// Where a pair is: its tile, and its row there.
struct Spot {
    u32 tile;
    u32 row;
};

__device__ inline u32 rounded_up(u32 value, u32 to) { return (value + to - 1) / to * to; }

// Tokens of each tile but the last of an expert that has `count`: tiles are alike.
__device__ inline u32 tile_tokens(const Params& p, u32 count) {
    const u32 tiles = (count + p.tile_tokens - 1) / p.tile_tokens;
    return tiles == 0 ? ROWS_STEP : rounded_up((count + tiles - 1) / tiles, ROWS_STEP);
}

// Byte in a pool at which a tile's rows of a step begin.
__device__ inline size_t tile_step(const Tile& tile, u32 steps, u32 step) {
    return (size_t(tile.first) * steps + size_t(step) * tile.rows) * ROW;
}

// Byte in a row of columns `column` and `column + 1`, an even one and the next, of 64.
__device__ inline u32 column_byte(u32 row, u32 column) {
    const u32 chunk = column % BLOCK / 2, block = column / BLOCK;
    return ((chunk ^ row % ROWS_STEP) << 4) + block * 4;
}

// Places that a block sorts. Its counts of each expert are a row of `p.counters`.
constexpr u32 SORTED_PLACES = 1024;
constexpr u32 SORT_THREADS = 256;

// Counts the experts of a block's places.
extern "C" __global__ void __launch_bounds__(SORT_THREADS) count_pairs(const Params p) {
    __shared__ u32 counts[EXPERTS_MAX];
    for (u32 expert = threadIdx.x; expert < p.experts; expert += SORT_THREADS) counts[expert] = 0;
    __syncthreads();
    for (u32 n = threadIdx.x; n < SORTED_PLACES; n += SORT_THREADS) {
        const u32 place = blockIdx.x * SORTED_PLACES + n;
        const int expert = place < p.tokens * p.top_k ? p.ids[place] : -1;
        if (expert >= 0) atomicAdd(&counts[expert], 1u);
    }
    __syncthreads();
    for (u32 expert = threadIdx.x; expert < p.experts; expert += SORT_THREADS)
        p.counters[blockIdx.x * p.experts + expert] = counts[expert];
}

// Tiles, and the pairs of a block's places, from all counts. The order of an expert's pairs may differ from run to run,
// and so may what shares a tile: no bit of an output depends on it.
extern "C" __global__ void __launch_bounds__(SORT_THREADS) sort_pairs(const Params p) {
    __shared__ u32 counts[EXPERTS_MAX], next[EXPERTS_MAX], firsts[EXPERTS_MAX], tiles[EXPERTS_MAX];
    for (u32 expert = threadIdx.x; expert < p.experts; expert += SORT_THREADS) {
        u32 all = 0, before = 0;
#pragma unroll 8
        for (u32 block = 0; block < gridDim.x; ++block) {
            const u32 count = p.counters[block * p.experts + expert];
            all += count;
            before += block < blockIdx.x ? count : 0;
        }
        counts[expert] = all;
        next[expert] = before;
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        const u32 lane = threadIdx.x;
        u32 rows = 0, all = 0;
        for (u32 base = 0; base < p.experts; base += 32) {
            const u32 expert = base + lane, count = expert < p.experts ? counts[expert] : 0;
            const u32 per = tile_tokens(p, count), here = (count + per - 1) / per;
            const u32 own_rows = rounded_up(count, ROWS_STEP);
            const u32 rows_end = rows + inclusive_sum(own_rows, lane);
            const u32 tiles_end = all + inclusive_sum(here, lane);
            const u32 first = rows_end - own_rows, first_tile = tiles_end - here;
            for (u32 n = 0; n < here && blockIdx.x == 0; ++n) {
                const u32 own = min(count - n * per, per);
                p.tiles[first_tile + n] = {expert, first + n * per, own, rounded_up(own, ROWS_STEP)};
            }
            if (expert < p.experts) {
                firsts[expert] = first;
                tiles[expert] = first_tile;
            }
            rows = __shfl_sync(~0u, rows_end, 31);
            all = __shfl_sync(~0u, tiles_end, 31);
        }
        if (lane == 0 && blockIdx.x == 0) {
            p.control[JOBS] = all;
            p.control[TILE_TICKETS] = p.control[TILE_TICKETS + 1] = 0;
        }
    }
    __syncthreads();
    for (u32 n = threadIdx.x; n < SORTED_PLACES; n += SORT_THREADS) {
        const u32 place = blockIdx.x * SORTED_PLACES + n;
        const int expert = place < p.tokens * p.top_k ? p.ids[place] : -1;
        if (expert < 0) continue;
        const u32 at = atomicAdd(&next[expert], 1u), per = tile_tokens(p, counts[expert]);
        p.pairs[firsts[expert] + at] = {place / p.top_k, place, p.weights[place], 0};
        p.spots[place] = {tiles[expert] + at / per, at % per};
    }
}

// Copies each token to its pairs' rows: a block for each token, eight lanes for each 64 columns. PAIRS at a time.
extern "C" __global__ void gather_tokens(const Params p) {
    constexpr u32 PAIRS = 32;
    struct Target {
        u8* row;
        u32 stride;  // of a step, in bytes
        u32 swizzle;
    };
    __shared__ Target targets[PAIRS];
    const u32 token = blockIdx.x, steps = steps_of(p.hidden), q = threadIdx.x % 8;
    const u32* x = reinterpret_cast<const u32*>(p.x + size_t(token) * p.hidden);
    for (u32 first = 0; first < p.top_k; first += PAIRS) {
        __syncthreads();
        const u32 pairs = min(p.top_k - first, PAIRS), place = token * p.top_k + first + threadIdx.x;
        if (threadIdx.x < pairs) {
            Target target = {};
            if (p.ids[place] >= 0) {
                const Spot spot = p.spots[place];
                const Tile tile = p.tiles[spot.tile];
                target = {p.pool + tile_step(tile, steps, 0) + spot.row * ROW, tile.rows * ROW,
                          spot.row % ROWS_STEP};
            }
            targets[threadIdx.x] = target;
        }
        __syncthreads();
        for (u32 step = threadIdx.x / 8; step < steps; step += blockDim.x / 8) {
            u32 words[4];
#pragma unroll
            for (u32 n = 0; n < 4; ++n) {
                const u32 word = step * (STEP_COLUMNS / 2) + n * 8 + q;
                words[n] = word < p.hidden / 2 ? x[word] : 0;
            }
            const uint4 chunk = {words[0], words[1], words[2], words[3]};
            for (u32 k = 0; k < pairs; ++k) {
                const Target target = targets[k];
                if (target.row == nullptr) continue;
                u8* row = target.row + size_t(step) * target.stride;
                *reinterpret_cast<uint4*>(row + ((q ^ target.swizzle) << 4)) = chunk;
            }
        }
    }
}

// The sum of terms, as a launch of its own.
extern "C" __global__ void sum_terms(const Params p) {
    combine_share(p, blockIdx.x * blockDim.x + threadIdx.x, gridDim.x * blockDim.x);
}
