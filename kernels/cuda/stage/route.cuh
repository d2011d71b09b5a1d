// From expert ids to work: pairs by expert, and jobs of up to JOB_TOKENS pairs. One block. The order
// of the pairs of an expert may differ from run to run: no bit of an output depends on it.

constexpr u32 JOB_TOKENS = 32;
constexpr u32 ROUTE_THREADS = 1024;
constexpr u32 EXPERTS_MAX = 1024;

// Inclusive sum over the block's threads.
__device__ inline u32 running_sum(u32 value, u32* shared) {
    shared[threadIdx.x] = value;
    __syncthreads();
    for (u32 reach = 1; reach < ROUTE_THREADS; reach *= 2) {
        const u32 before = threadIdx.x >= reach ? shared[threadIdx.x - reach] : 0;
        __syncthreads();
        shared[threadIdx.x] += before;
        __syncthreads();
    }
    const u32 sum = shared[threadIdx.x];
    __syncthreads();
    return sum;
}

extern "C" __global__ void __launch_bounds__(ROUTE_THREADS) route(const Params p) {
    __shared__ u32 next[EXPERTS_MAX], scratch[ROUTE_THREADS];
    const u32 expert = threadIdx.x, places = p.tokens * p.top_k;
    next[expert] = 0;
    __syncthreads();
    for (u32 place = threadIdx.x; place < places; place += ROUTE_THREADS)
        if (p.ids[place] >= 0) atomicAdd(&next[p.ids[place]], 1u);
    __syncthreads();
    const u32 count = next[expert], jobs = (count + JOB_TOKENS - 1) / JOB_TOKENS;
    const u32 first = running_sum(count, scratch) - count;
    const u32 end = running_sum(jobs, scratch), first_job = end - jobs;
    for (u32 job = 0; job < jobs; ++job) {
        const u32 at = job * JOB_TOKENS;
        p.jobs[first_job + job] = {expert, first + at, min(count - at, JOB_TOKENS), 0};
        p.counters[first_job + job] = 0;
    }
    if (expert == ROUTE_THREADS - 1) {
        p.control[0] = end;
        p.control[1] = 0;
    }
    next[expert] = first;
    __syncthreads();
    for (u32 place = threadIdx.x; place < places; place += ROUTE_THREADS) {
        if (p.ids[place] < 0) continue;
        const u32 at = atomicAdd(&next[p.ids[place]], 1u);
        p.pairs[at] = {place / p.top_k, place, p.weights[place], 0};
    }
}
