// persistent_params.cuh: what the launch plan of persistent.cu fixes, and what follows from it; and whose turn a block is.
//
// Compiled with -D: BACKWARD SCALAR IEEE SCOPE BLOCKS UNIT_TILES K_SPLITS K_REGISTERS K_SHARED BATCH_TILES PIECES
// DIRECTIONS LAYERS SHARED_BYTES, one plan for each direction of time; a warp's k tiles are K_REGISTERS + K_SHARED,
// backward for each gate.
// For benchmarks alone: -DONLY=EXCHANGE leaves the products out, -DONLY=PRODUCT sends and awaits nothing.
#pragma once

#define BLOCK 0
#define CLUSTER 1
#define GRID 2

#define EXCHANGE 1
#define PRODUCT 2
#ifndef ONLY
#define ONLY 0
#endif

constexpr int WARPS = UNIT_TILES * K_SPLITS;
constexpr int THREADS = 32 * WARPS;
constexpr int U = 16 * UNIT_TILES;                     // hidden units of a block
constexpr int NB = (IEEE ? 2 : 8) * BATCH_TILES;       // batch rows of a group
constexpr int OWN = (U * NB + THREADS - 1) / THREADS;  // elements of a thread
constexpr bool WHOLE = OWN * THREADS == U * NB;        // every thread has so many
constexpr int ROWS_APART = THREADS / U;                // batch rows from one of a thread's elements to its next
static_assert(THREADS % U == 0, "a thread's elements are of one unit");
constexpr int PITCH = U + 4;                           // of a row of partial sums: few lanes hit the same bank
constexpr int MEMBERS = DIRECTIONS * LAYERS;           // of a launch; one of the two is 1
constexpr bool STACK = LAYERS > 1;
constexpr bool STACK_BACK = STACK && BACKWARD;
constexpr int K_STEP = 32 / sizeof(SCALAR);            // k tile: 16 halves or 8 floats, 32 bytes either way

#if SCOPE == CLUSTER && !GPU_RNN_ON_HOST
#define RESIDENT_KERNEL __cluster_dims__(BLOCKS, 1, 1) __launch_bounds__(THREADS, 1)
#else
#define RESIDENT_KERNEL __launch_bounds__(THREADS, 1)
#endif

// Groups take turns: one for each direction or layer, then the next tile of the batch.
DEVICE int group() { return blockIdx.x / BLOCKS; }
DEVICE int member() { return group() % MEMBERS; }
DEVICE int tile() { return group() / MEMBERS; }
