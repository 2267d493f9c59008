// matmul_tile.cuh: the matmul of persistent.cu, stationary weights [16 * gate sets, k] by a few columns of the batch.
//
// mma has the weights as its 16-row operand and the batch on its narrow side of 8. IEEE float32 is fused multiply-adds,
// and the batch comes in pairs. A warp adds up its own k tiles in `Sums`.
#pragma once

// ---- The operands, by storage type -------------------------------------------------------------------

DEVICE __half encoded(float x, __half) { return from_float<__half>(x); }
DEVICE __nv_bfloat16 encoded(float x, __nv_bfloat16) { return from_float<__nv_bfloat16>(x); }
DEVICE float encoded(float x, float) { return IEEE ? x : __uint_as_float(to_tf32(x)); }

DEVICE unsigned short bits_of(__half) { return 0; }  // the unsigned type of as many bits
DEVICE unsigned short bits_of(__nv_bfloat16) { return 0; }
DEVICE unsigned bits_of(float) { return 0; }

// One lane's part of the 16 x K_TILE_SIZE fragment of `element(row, k)`, in the layout of mma. Elements are the bits of
// numbers.
template <class Element>
DEVICE void fragment(unsigned a[4], Element element, int lane, unsigned short) {  // of 16 bits
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i % 2 * 8, k = lane % 4 * 2 + i / 2 * 8;
        a[i] = element(row, k) | static_cast<unsigned>(element(row, k + 1)) << 16;
    }
}
template <class Element>
DEVICE void fragment(unsigned a[4], Element element, int lane, unsigned) {  // of 32 bits
    for (int i = 0; i < 4; ++i) a[i] = to_tf32(__uint_as_float(element(lane / 4 + i % 2 * 8, lane % 4 + i / 2 * 4)));
}

// The layout for fused multiply-adds. A lane has 1 row and 4 k of a fragment, or 2 and 2, so that few lanes share a row
// and have to add up, and yet an operand that is read from shared memory is used more than once.
template <int LANE_ROWS, class Element>
DEVICE void ieee_fragment(unsigned a[4], Element element, int lane) {
    constexpr int LANES = 16 / LANE_ROWS;  // with the same k
    for (int i = 0; i < 4; ++i) {
        const int row = lane % LANES + i % LANE_ROWS * 8, k = lane / LANES * (4 / LANE_ROWS) + i / LANE_ROWS;
        a[i] = element(row, k);
    }
}

// ---- The matmul ----------------------------------------------------------------------------------------------------

struct Corner {
    int row, column;
};

#if IEEE

template <int GATE_SETS>
struct Sums {
    static constexpr int LANE_ROWS = GATE_SETS > 1 ? 1 : 2;
    struct alignas(16 / LANE_ROWS) Operand {
        float k[4 / LANE_ROWS];
    };
    float sums[GATE_SETS][LANE_ROWS][BATCH_ROWS] = {};  // over this lane's k

    // Where in a k tile of the operand a lane reads, in bytes.
    template <int PITCH>
    DEVICE static int lane_at(int lane) {
        return lane / (16 / LANE_ROWS) * sizeof(Operand);
    }

    // Add k tiles `first` to `last`. `tile` is where the lane reads the first of them in the operand, whose batch rows are
    // PITCH bytes apart; load(a, r, j) loads this lane's part of fragment j of gate set r.
    template <int PITCH, class Load>
    DEVICE void add(const unsigned char* tile, int first, int last, Load load) {
#pragma unroll
        for (int j = first; j < last; ++j, tile += 32) {
            unsigned a[GATE_SETS][4];
#pragma unroll
            for (int r = 0; r < GATE_SETS; ++r) load(a[r], r, j);
#pragma unroll
            for (int n = 0; n < BATCH_ROWS; ++n) {
                const Operand b = *reinterpret_cast<const Operand*>(tile + n * PITCH);
#pragma unroll
                for (int r = 0; r < GATE_SETS; ++r) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        float& sum = sums[r][i % LANE_ROWS][n];
                        sum = fmaf(__uint_as_float(a[r][i]), b.k[i / LANE_ROWS], sum);
                    }
                }
            }
        }
    }

    // Lanes that differ in one bit add up two sums that both have: the lane with the bit returns the second.
    DEVICE static float fold(float first, float second, int lane, int bit) {
        const bool upper = (lane & bit) != 0;
        return (upper ? second : first) + __shfl_xor_sync(~0u, upper ? first : second, bit);
    }

    // give(r, row of the fragment, batch row, sum) for each sum that this lane stores, rows from `corner` on.
    DEVICE static Corner corner(int lane) { return {lane % 16, lane / 16}; }
    template <class Give>
    DEVICE void finish(int lane, Give give) const {
#pragma unroll
        for (int r = 0; r < GATE_SETS; ++r) {
#pragma unroll
            for (int n = 0; n < BATCH_ROWS; n += 2) {
                float sum[LANE_ROWS];
#pragma unroll
                for (int i = 0; i < LANE_ROWS; ++i) sum[i] = fold(sums[r][i][n], sums[r][i][n + 1], lane, 16);
                if (LANE_ROWS == 2) sum[0] = fold(sum[0], sum[LANE_ROWS - 1], lane, 8);
                give(r, 0, n, sum[0]);
            }
        }
    }
};

#else

DEVICE void multiply(float sums[4], const unsigned a[4], const unsigned b[2], __half) {
    mma_m16n8k16_f16(sums, a, b, sums);
}
DEVICE void multiply(float sums[4], const unsigned a[4], const unsigned b[2], __nv_bfloat16) {
    mma_m16n8k16_bf16(sums, a, b, sums);
}
DEVICE void multiply(float sums[4], const unsigned a[4], const unsigned b[2], float) {
    mma_m16n8k8_tf32(sums, a, b, sums);
}

template <int GATE_SETS>
struct Sums {
    static constexpr int CHAINS = GATE_SETS * BATCH_TILES > 2 ? 1
                                                              : 4 / (GATE_SETS * BATCH_TILES);  // to hide mma's latency
    float sums[CHAINS][GATE_SETS][BATCH_TILES][4] = {};

    // Where in two k tiles of the operand a lane points for ldmatrix, in bytes; for one tile the upper half of a warp
    // doesn't count.
    template <int PITCH>
    DEVICE static int lane_at(int lane) {
        return lane % 8 * PITCH + lane / 8 * 16;
    }

    // Add k tiles `first` to `last`. `tile` is where the lane reads the first of them in the operand, whose batch rows are
    // PITCH bytes apart; load(a, r, j) loads this lane's part of fragment j of gate set r.
    template <int PITCH, class Load>
    DEVICE void add(const unsigned char* tile, int first, int last, Load load) {
#pragma unroll
        for (int j = first; j < last; j += 2, tile += 64) {
            unsigned b[BATCH_TILES][4];  // the columns of two k tiles
#pragma unroll
            for (int n = 0; n < BATCH_TILES; ++n) {
                if (j + 1 < last)
                    ldmatrix_x4(b[n], tile + n * 8 * PITCH);
                else
                    ldmatrix_x2(b[n], tile + n * 8 * PITCH);
            }
#pragma unroll
            for (int next = 0; next < 2 && j + next < last; ++next) {
#pragma unroll
                for (int r = 0; r < GATE_SETS; ++r) {
                    unsigned a[4];
                    load(a, r, j + next);
#pragma unroll
                    for (int n = 0; n < BATCH_TILES; ++n)
                        multiply(sums[(j + next) % CHAINS][r][n], a, &b[n][2 * next], SCALAR());
                }
            }
        }
    }

    // give(r, row of the fragment, batch row, sum) for each sum that this lane stores, rows from `corner` on.
    DEVICE static Corner corner(int lane) { return {lane / 4, lane % 4 * 2}; }
    template <class Give>
    DEVICE void finish(int lane, Give give) const {
#pragma unroll
        for (int r = 0; r < GATE_SETS; ++r) {
#pragma unroll
            for (int n = 0; n < BATCH_TILES; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float sum = sums[0][r][n][i];
                    for (int chain = 1; chain < CHAINS; ++chain) sum += sums[chain][r][n][i];
                    give(r, i / 2 * 8, n * 8 + i % 2, sum);
                }
            }
        }
    }
};

#endif
