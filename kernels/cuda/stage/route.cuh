// From expert ids to work: pairs by expert, and jobs of up to JOB_TOKENS pairs, by all threads of one
// block. The order of the pairs of an expert may differ from run to run: no bit of an output depends
// on it.

constexpr u32 JOB_TOKENS = 32;
constexpr u32 EXPERTS_MAX = 1024;

__device__ inline u32 inclusive_sum(u32 value, u32 lane) {
    for (u32 reach = 1; reach < 32; reach *= 2) {
        const u32 before = __shfl_up_sync(~0u, value, reach);
        if (lane >= reach) value += before;
    }
    return value;
}

// Turns counts into first positions, and writes the jobs; by one warp.
__device__ inline void make_jobs(const Params& p, u32* next, u32 lane) {
    u32 pairs = 0, jobs = 0;
    for (u32 base = 0; base < p.experts; base += 32) {
        const u32 expert = base + lane, count = expert < p.experts ? next[expert] : 0;
        const u32 here = (count + JOB_TOKENS - 1) / JOB_TOKENS;
        const u32 pairs_end = pairs + inclusive_sum(count, lane);
        const u32 jobs_end = jobs + inclusive_sum(here, lane);
        const u32 first = pairs_end - count, first_job = jobs_end - here;
        for (u32 job = 0; job < here; ++job) {
            const u32 at = job * JOB_TOKENS;
            p.jobs[first_job + job] = {expert, first + at, min(count - at, JOB_TOKENS), 0};
            p.counters[first_job + job] = 0;
        }
        if (expert < p.experts) next[expert] = first;
        pairs = __shfl_sync(~0u, pairs_end, 31);
        jobs = __shfl_sync(~0u, jobs_end, 31);
    }
    if (lane == 0) p.control[JOBS] = jobs;
}

// `next` has EXPERTS_MAX words of shared memory.
__device__ inline void route(const Params& p, u32* next) {
    const u32 places = p.tokens * p.top_k;
    for (u32 expert = threadIdx.x; expert < p.experts; expert += blockDim.x) next[expert] = 0;
    __syncthreads();
    for (u32 place = threadIdx.x; place < places; place += blockDim.x)
        if (p.ids[place] >= 0) atomicAdd(&next[p.ids[place]], 1u);
    __syncthreads();
    if (threadIdx.x < 32) make_jobs(p, next, threadIdx.x);
    __syncthreads();
    for (u32 place = threadIdx.x; place < places; place += blockDim.x) {
        if (p.ids[place] < 0) continue;
        const u32 at = atomicAdd(&next[p.ids[place]], 1u);
        p.pairs[at] = {place / p.top_k, place, p.weights[place], 0};
    }
    __syncthreads();
    if (threadIdx.x == 0 && WITHHELD != ORDER) store_release(&p.control[ROUTED], p.call);
}

__device__ inline bool is_small(const Params& p) {
    return p.tokens * p.top_k <= SMALL_PLACES;
}

// Position of set bit number `n`.
__device__ inline u32 nth_bit(u32 bits, u32 n) {
    for (; n > 0; --n) bits &= bits - 1;
    return __ffs(bits) - 1;
}

// The jobs of a small call, in the registers of one warp: each lane has a place. To wait for the first
// block would take longer. All warps that do this find the same.
struct SmallCall {
    int expert;
    float weight;
    u32 same;     // lanes of this lane's expert
    u32 first;    // of the first lane of an expert: position of its pairs
    u32 leaders;  // the first lane of each expert
    __device__ void sort(const Params& p, u32 lane) {
        const bool there = lane < p.tokens * p.top_k;
        expert = there ? p.ids[lane] : -1;
        weight = there ? p.weights[lane] : 0.0f;
        same = __match_any_sync(~0u, expert);
        const bool leads = expert >= 0 && lane == nth_bit(same, 0);
        leaders = __ballot_sync(~0u, leads);
        const u32 count = leads ? __popc(same) : 0;
        first = inclusive_sum(count, lane) - count;
    }
    __device__ u32 jobs() const { return __popc(leaders); }
    __device__ Job job(u32 index) const {
        const u32 leader = nth_bit(leaders, index);
        const u32 lanes = __shfl_sync(~0u, same, leader);
        return {u32(__shfl_sync(~0u, expert, leader)), __shfl_sync(~0u, first, leader),
                u32(__popc(lanes)), lanes};
    }
    // Pair number `lane` of a job that has so many.
    __device__ Pair pair(const Params& p, u32 lanes, u32 lane) const {
        const u32 place = lane < __popc(lanes) ? nth_bit(lanes, lane) : 0;
        return {place / p.top_k, place, __shfl_sync(~0u, weight, place), 0};
    }
};
