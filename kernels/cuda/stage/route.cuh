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
    if (lane == 0) {
        p.control[JOBS] = jobs;
        p.control[TICKETS] = 0;
        p.control[FINISHED] = 0;
    }
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
    if (threadIdx.x == 0) store_release(&p.control[ROUTED], p.call);
}
