// What a launch gets: one struct, whose twin is Params in kernels/src/cuda/params.rs.

// Pairs of one expert that stream its weights together: at most JOB_TOKENS.
struct Job {
    u32 expert;
    u32 first;  // position in the pairs
    u32 count;
    u32 reserved;
};

// One (token, expert) pair; pairs lie by expert.
struct Pair {
    u32 token;
    u32 place;  // token * top_k + place: its term
    float weight;
    u32 reserved;
};

// Words that the blocks of a launch share. TICKETS, FINISHED, LEFT and the counters are 0 before every
// launch: the last block to leave resets them.
enum Control : u32 {
    JOBS,       // how many there are
    TICKETS,    // drawn beyond the first of each block
    FINISHED,   // blocks that have written their last term
    ROUTED,     // the call whose jobs are there
    LEFT,       // blocks that look at none of this any more
    TILE_TICKETS,  // of a tiled call: drawn of FC1, of FC2
    EXPIRED = 7,   // the first wait that a block gave up (stage/wait.cuh), 0 if none did
    COUNTERS = 8,  // of a small call, for each of its jobs: tiles of FC1 that are done
};

// Places of a call whose jobs every copying warp finds by itself, a lane for each.
constexpr u32 SMALL_PLACES = 32;

// fp32 products of one expert's scales; the alphas with UNSCALE.
struct Scalars {
    float gate_alpha;
    float up_alpha;
    float fc2_alpha;
    float norm_const;
};

struct Tile;
struct Spot;

struct Params {
    const u8* fc1;           // units of every expert, tiles of 8 gate and 8 up rows
    const u8* fc2;           // units of every expert, tiles of 16 rows
    const Scalars* scalars;  // [experts]
    u16* x;                  // bf16 [tokens, hidden]
    u16* mid;                // bf16 [pairs, intermediate]
    u16* terms;              // bf16 [tokens * top_k, hidden]
    u16* out;                // bf16 [tokens, hidden]
    Job* jobs;
    u32* counters;           // [jobs]: tiles of FC1 that are done; in `control` for a small call
    u32* control;            // see the words of Control
    Pair* pairs;
    u8* pool;                // of a tiled call: tokens by expert; so is its `mid` (stage/pool.cuh)
    Tile* tiles;
    Spot* spots;             // [tokens * top_k]
    const int* ids;          // [tokens, top_k]
    const float* weights;    // [tokens, top_k]
    u32* status;             // of a streamed call: what EXPIRED was at its end
    u64 deadline_ns;         // for which a block waits for others
    u32 tokens;
    u32 top_k;
    u32 hidden;
    u32 intermediate;
    u32 experts;
    u32 quantised;           // act=nvfp4
    u32 weights_in_combine;
    float g;                 // 1 / in13
    float limit;             // infinite where there is none
    float alpha;
    float beta;
    u32 lag;                 // jobs by which FC1 runs ahead of FC2
    u32 call;                // a number that the call before did not have
    u32 tile_tokens;         // most pairs of a tile of a tiled call
};
