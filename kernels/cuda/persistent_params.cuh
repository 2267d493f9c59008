// persistent_params.cuh: the configuration of persistent.cu (kernels/cuda/persistent/config.py), and what follows from
// it.
//
// Compiled with -D: BACKWARD SCALAR IEEE SCOPE BLOCKS UNIT_TILES K_SPLITS K_REGISTERS K_SHARED BATCH_TILES K_CHUNKS
// DIRECTIONS LAYERS SHARED_BYTES, for one direction of time; a warp's k tiles are K_REGISTERS + K_SHARED, backward for
// each gate. For benchmarks alone: -DPROFILE_ONLY=EXCHANGE leaves out the matmuls, -DPROFILE_ONLY=PRODUCT the exchange.
#pragma once

#define BLOCK 0
#define CLUSTER 1
#define GRID 2

#define EXCHANGE 1
#define PRODUCT 2
#ifndef PROFILE_ONLY
#define PROFILE_ONLY 0
#endif

constexpr int WARPS = UNIT_TILES * K_SPLITS;
constexpr int THREADS = 32 * WARPS;
constexpr int BLOCK_UNITS = 16 * UNIT_TILES;                                   // hidden units of a block
constexpr int BATCH_ROWS = (IEEE ? 2 : 8) * BATCH_TILES;                       // of a group
constexpr int ELEMENTS = (BLOCK_UNITS * BATCH_ROWS + THREADS - 1) / THREADS;   // of a thread
constexpr bool FULL_THREADS = ELEMENTS * THREADS == BLOCK_UNITS * BATCH_ROWS;  // every thread has so many
constexpr int ROW_STRIDE = THREADS / BLOCK_UNITS;  // batch rows from one of a thread's elements to its next
static_assert(THREADS % BLOCK_UNITS == 0, "a thread's elements are of one unit");
DEVICE int unit_of(unsigned thread) { return thread % BLOCK_UNITS; }  // of a thread's first element, in the block
DEVICE int row_of(unsigned thread) { return thread / BLOCK_UNITS; }   // of the same, in the group
constexpr int SUMS_PITCH = BLOCK_UNITS + 4;     // of a row of partial sums, against bank conflicts
constexpr int INSTANCES = DIRECTIONS * LAYERS;  // of a launch; one of the two is 1
constexpr bool WAVEFRONT = LAYERS > 1;
constexpr bool WAVEFRONT_BACKWARD = WAVEFRONT && BACKWARD;
constexpr int K_TILE_SIZE = 32 / sizeof(SCALAR);  // 16 numbers of 16 bits or 8 of 32, 32 bytes either way

#if SCOPE == CLUSTER && !GPU_RNN_ON_HOST
#define PERSISTENT_KERNEL __cluster_dims__(BLOCKS, 1, 1) __launch_bounds__(THREADS, 1)
#else
#define PERSISTENT_KERNEL __launch_bounds__(THREADS, 1)
#endif

// Groups alternate: one of each instance (direction, head or layer), then those of the next batch tile.
DEVICE int group() { return blockIdx.x / BLOCKS; }
DEVICE int instance() { return group() % INSTANCES; }
DEVICE int batch_tile() { return group() / INSTANCES; }
