// persistent_block.cuh: what a block of persistent.cu holds, and how its group exchanges what it multiplies.
#pragma once

// The values of a unit that a group exchanges. Backward they are the gradients of the gates' recurrent parts. In a
// stack both matrices multiply them: where an input part has a gradient of its own, that follows behind the others.
struct Values {
    static constexpr int COUNT_APART = STACK_BACK ? Cell::COUNT_SEPARATE : 0;
    static constexpr int COUNT = BACKWARD ? Cell::G + COUNT_APART : 1;

    // The gate whose rows of the recurrent or the input weights meet a value; -1: none of theirs.
    DEVICE static int gate(int value, bool of_input) {
        if (value < Cell::G) return of_input && (Cell::SEPARATE >> value & 1) != 0 ? -1 : value;
        return of_input ? apart(value - Cell::G) : -1;
    }
    DEVICE static constexpr int apart(int n) {  // the n-th gate with two gradients
        for (int gate = 0; gate < Cell::G; ++gate)
            if ((Cell::SEPARATE >> gate & 1) != 0 && n-- == 0) return gate;
        return -1;
    }
};

// What a warp has of a matrix: k tiles in registers first, in shared memory then.
struct Rows {
    static constexpr int SETS = BACKWARD ? 1 : Cell::G;
    static constexpr int IN_REGISTERS = Values::COUNT * K_REGISTERS;
    static constexpr int IN_SHARED = Values::COUNT * K_SHARED;
    static constexpr int TILES = IN_REGISTERS + IN_SHARED;
    static constexpr int BYTES = WARPS * SETS * IN_SHARED * 512;  // of the block, in shared memory

    uint4* shared;  // [WARPS][SETS][IN_SHARED][32]
    unsigned held[SETS][IN_REGISTERS > 0 ? IN_REGISTERS : 1][4];

    // This warp's fragments of R [G, H, H], recurrent or input weights, a lane by pairs of numbers: once for a sequence it
    // may be slow, and a layout made beforehand would cost a launch. On the way to registers they lie in `area`, shared
    // memory of AREA bytes: in a loop that is unrolled for registers the compiler has too many loads under way.
    template <int AREA>
    DEVICE void load(void* area, const SCALAR* R, bool of_input, int H, int rank, int warp, int lane) {
        constexpr int MOST = AREA / (WARPS * 512), CHUNK = MOST < IN_REGISTERS ? MOST : IN_REGISTERS;
        uint4* staged = static_cast<uint4*>(area) + warp * CHUNK * 32 + lane;  // read back by this very lane, as is
        shared += warp * SETS * IN_SHARED * 32 + lane;
#pragma unroll
        for (int r = 0; r < SETS; ++r) {
#pragma unroll
            for (int j = 0; CHUNK == 0 && j < IN_REGISTERS; ++j)  // few: straight to registers
                keep(held[r][j], read(R, of_input, H, rank, warp, lane, r, j));
#pragma unroll
            for (int first = 0; CHUNK > 0 && first < IN_REGISTERS; first += CHUNK > 0 ? CHUNK : 1) {
#pragma unroll 4
                for (int j = 0; j < CHUNK; ++j)
                    if (first + j < IN_REGISTERS) staged[j * 32] = read(R, of_input, H, rank, warp, lane, r, first + j);
#pragma unroll
                for (int j = 0; j < CHUNK && first + j < IN_REGISTERS; ++j) keep(held[r][first + j], staged[j * 32]);
            }
#pragma unroll 4
            for (int j = 0; j < IN_SHARED; ++j)
                shared[(r * IN_SHARED + j) * 32] = read(R, of_input, H, rank, warp, lane, r, IN_REGISTERS + j);
        }
    }

    DEVICE static void keep(unsigned to[4], uint4 a) { to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w; }

    // This lane's part of k tile j of row set r. Operand columns run over blocks, values, units of the block; a k tile
    // has one value's.
    DEVICE static uint4 read(const SCALAR* R, bool of_input, int H, int rank, int warp, int lane, int r, int j) {
        const int column = (warp % K_SPLITS * TILES + j) * K_STEP, within = column % (Values::COUNT * U);
        const int unit0 = rank * U + warp / K_SPLITS * 16, other0 = column / (Values::COUNT * U) * U + within % U;
        const int gate = BACKWARD ? Values::gate(within / U, of_input) : r;
        using Bits = decltype(bits_of(SCALAR()));
        auto element = [&](int row, int k) -> Bits {
            const int unit = unit0 + row, other = other0 + k;
            if (unit >= H || other >= H || gate < 0) return 0;
            const int at = BACKWARD ? (gate * H + other) * H + unit : (gate * H + unit) * H + other;  // below 2^31
            return reinterpret_cast<const Bits*>(R)[at];
        };
        unsigned a[4];
#if IEEE
        ieee_fragment<Sums<SETS>::LANE_ROWS>(a, element, lane);
#else
        fragment(a, element, lane, Bits());
#endif
        return make_uint4(a[0], a[1], a[2], a[3]);
    }

    DEVICE void take(unsigned a[4], int r, int j) const {
        if (j < IN_REGISTERS) {
            for (int i = 0; i < 4; ++i) a[i] = held[r][j < IN_REGISTERS ? j : 0][i];
        } else {
            const uint4 w = shared[(r * IN_SHARED + j - IN_REGISTERS) * 32];
            a[0] = w.x, a[1] = w.y, a[2] = w.z, a[3] = w.w;
        }
    }
};

struct Residence {  // for one direction of time
    static constexpr int ROWS = Rows::SETS, VALUES = Values::COUNT, TILES = Rows::TILES;
    static constexpr int PIECE = (TILES + PIECES - 1) / PIECES;          // k tiles of a warp in one piece
    static constexpr int SLICE = VALUES * U * sizeof(SCALAR);            // bytes a block publishes per batch row
    static constexpr int ROW = K_SPLITS * PIECE * 32 + 16;               // operand's pitch: ldmatrix without conflicts
    static constexpr int OPERAND = NB * ROW;
    static constexpr int PARTS = K_SPLITS * ROWS * NB * PITCH * 4;
    static constexpr int OPERANDS = SCOPE == CLUSTER ? 2 : 1;            // peers of a cluster store ahead of the reader
    static constexpr int TRIPLES = (NB + 2) / 3;                         // a stamped word has 4 bytes of 3 batch rows
    static constexpr long long PUBLICATION = TRIPLES * BLOCKS * (SLICE / 4);  // words
    static constexpr int STAGED = SCOPE == GRID ? TRIPLES * 3 * SLICE : 0;
    static constexpr int BYTES = OPERANDS * OPERAND + STAGED + PARTS + Rows::BYTES + 16 + Meeting::BYTES;
    static constexpr int BESIDE = !STACK ? 0 : BACKWARD ? PARTS + Rows::BYTES : BYTES;  // for the input weights
    static_assert(BYTES + BESIDE == SHARED_BYTES, "the launch plan asks for this much shared memory");
    static_assert(!STACK || Levels::COUNT == 0, "units of a stack don't meet");
    static_assert(BLOCKS * SLICE <= K_SPLITS * TILES * 32, "the warps' k tiles cover what all blocks publish");
    static_assert((PIECES - 1) * PIECE < TILES, "no piece is empty");
    static_assert(SCOPE == GRID || PIECES == 1, "what peers store at any time is there as a whole");
    static_assert(!(STACK_BACK || BLOCKS == 1) || PIECES == 1, "what is multiplied twice, or made here, is whole");

    unsigned char* operand;  // [OPERANDS][NB][ROW]: the one multiplied, and in a cluster the one being received
    unsigned char* staged;   // GRID: [TRIPLES * 3][SLICE], the block's own values, to be published
    float* parts;            // [K_SPLITS][ROWS][NB][PITCH]
    Rows weights;
    int warp, lane, rank;
    int rows;                // of the batch that this group has: the others aren't exchanged
    Meeting meeting;
#if SCOPE == CLUSTER
    Mbarrier* received;      // [2], one for each operand
#elif SCOPE == GRID
    uint4* exchange;         // of a group: two of [TRIPLES][BLOCKS * SLICE / 4], or one for each publication
#endif

    static constexpr bool KEEPS = STACK && !BACKWARD;  // its publications, for another layer
    static constexpr bool ALONE = BLOCKS == 1;         // what the block makes itself goes straight into its operand
    static constexpr bool SENDS = SCOPE == GRID && (!ALONE || KEEPS);

    bool waits;  // for what others publish
#if SCOPE == GRID
    int member;  // of the threads that receive the same columns
    int asked;   // the first word that this thread receives of a publication: 4 bytes of a batch row's
    int filled;  // and where they go in the operand
#endif

    DEVICE static long long group_words(long long T) { return (KEEPS ? T + 1 : 2) * PUBLICATION + Meeting::EXCHANGED; }

    // `from`: the group whose publications are received; its own, or that of the layer below. R: see Rows; or null.
    DEVICE Residence(
        unsigned char* arena, uint4* exchanges, int from, long long T, int rows_left, const SCALAR* R, int H)
        : operand(arena),
          staged(operand + OPERANDS * OPERAND),
          parts(reinterpret_cast<float*>(staged + STAGED)),
          weights{reinterpret_cast<uint4*>(staged + STAGED + PARTS), {}},
          warp(threadIdx.x / 32),
          lane(threadIdx.x % 32),
          rank(blockIdx.x % BLOCKS),
          rows(max(0, min(NB, rows_left - tile() * NB))),
          waits(!ALONE || from != group()),
          meeting(staged + STAGED + PARTS + Rows::BYTES + 16,
                  exchanges + from * group_words(T) + group_words(T) - Meeting::EXCHANGED) {
        constexpr int BEFORE_WEIGHTS = OPERANDS * OPERAND + STAGED + PARTS;
        if (R != nullptr) weights.template load<BEFORE_WEIGHTS>(operand, R, from != group(), H, rank, warp, lane);
        __syncthreads();  // weights are no longer on their way through what is now made zero
        for (int i = threadIdx.x; i < (OPERANDS * OPERAND + STAGED) / 16; i += THREADS)
            reinterpret_cast<uint4*>(operand)[i] = make_uint4(0, 0, 0, 0);  // what nobody publishes stays zero
#if SCOPE == CLUSTER
        received = reinterpret_cast<Mbarrier*>(staged + STAGED + PARTS + Rows::BYTES);
        if (threadIdx.x == 0) {
            mbarrier_init(&received[0], 1);
            mbarrier_init(&received[1], 1);
            fence_mbarrier_init();
        }
        cluster_sync();  // barriers are ready and operands zero before a peer stores
#else
        __syncthreads();  // operands are zero before anyone fills them
#endif
#if SCOPE == GRID
        exchange = exchanges + from * group_words(T);
        member = warp / K_SPLITS * 32 + lane;
        const int column = warp % K_SPLITS * TILES * 8 + member;
        asked = PIECES == 1 ? in_register(column) : column;  // large batches, in pieces, leave no register
        filled = PIECES == 1 ? asked * 4 : warp % K_SPLITS * PIECE * 32 + member * 4;
#endif
    }

    // In the following n is the number of a publication, from 0.

    // Multiply with what has been published. The sums are then in `parts`, one for each K split, for `sum` to add.
    DEVICE void multiply_all(long long n) {
        Sums<ROWS> sums;
#pragma unroll
        for (int piece = 0; piece < PIECES; ++piece) {
            const int first = piece * PIECE, last = min(first + PIECE, TILES);
            if (piece > 0) team_sync();  // the one before it has been multiplied
            await(n, first, last);
            multiply(n, first, last, weights, sums);
        }
        lay_out(sums, parts);
    }

    // Once more, by another matrix, what `multiply_all` has multiplied. The sums are then in `others`, likewise.
    DEVICE void multiply_again(long long n, const Rows& matrix, float* others) const {
        Sums<ROWS> sums;
        multiply(n, 0, TILES, matrix, sums);
        lay_out(sums, others);
    }

    DEVICE void multiply(long long n, int first, int last, const Rows& matrix, Sums<ROWS>& sums) const {
        if (ONLY == EXCHANGE) return;
        const unsigned char* tile = operand + n % OPERANDS * OPERAND + warp % K_SPLITS * PIECE * 32;
        sums.template add<ROW>(tile, first, last, lane, [&](unsigned a[4], int r, int j) { matrix.take(a, r, j); });
    }

    DEVICE void lay_out(const Sums<ROWS>& sums, float* to) const {
        const Corner at = Sums<ROWS>::corner(lane);
        to += (warp % K_SPLITS * ROWS * NB + at.column) * PITCH + warp / K_SPLITS * 16 + at.row;
        sums.finish(lane, [&](int r, int row, int column, float sum) { to[(r * NB + column) * PITCH + row] = sum; });
        __syncthreads();  // all parts are there, and the operand has been multiplied
    }

    DEVICE float sum(int r, int row, int unit) const { return sum_of(parts, r, row, unit); }
    DEVICE static float sum_of(const float* from, int r, int row, int unit) {
        float total = 0;
#pragma unroll
        for (int split = 0; split < K_SPLITS; ++split) total += from[((split * ROWS + r) * NB + row) * PITCH + unit];
        return total;
    }

    // This thread's value for everyone, to be published.
    DEVICE void put(long long n, int value, int row, int unit, float x) {
        const SCALAR stored = encoded(x, SCALAR());
        if (SENDS) reinterpret_cast<SCALAR*>(staged + row * SLICE)[value * U + unit] = stored;
        if (SCOPE == GRID && !ALONE) return;
        unsigned char* slice = operand + n % OPERANDS * OPERAND + row * ROW + rank * SLICE;
        reinterpret_cast<SCALAR*>(slice)[value * U + unit] = stored;
    }

    // All threads have put: give the block's slice to the others.
    DEVICE void publish(long long n) {
        __syncthreads();  // the slice is complete, and the parts have been read
        if (ONLY == PRODUCT) return;
#if SCOPE == CLUSTER
        if (threadIdx.x == 0) mbarrier_arrive_expect_tx(&received[n % 2], (BLOCKS - 1) * rows * SLICE);
        unsigned char* slice = operand + n % OPERANDS * OPERAND + rank * SLICE;
        constexpr int EACH = (NB * (SLICE / 16) + 31) / 32;  // pieces of 16 bytes of a lane
#pragma unroll
        for (int piece = 0; piece < EACH; ++piece) {
            const int i = lane + piece * 32;
            uint4* mine = reinterpret_cast<uint4*>(slice + i / (SLICE / 16) * ROW + i % (SLICE / 16) * 16);
            if (i >= rows * (SLICE / 16)) break;
            const uint4 value = *mine;
#pragma unroll
            for (int turn = 0; turn < (BLOCKS - 1 + WARPS - 1) / WARPS; ++turn) {
                const int peer = warp + turn * WARPS;  // not all at one peer at a time
                if (peer < BLOCKS - 1) st_async(mine, value, &received[n % 2], (rank + 1 + peer) % static_cast<unsigned>(BLOCKS));
            }
        }
#elif SCOPE == GRID
        if (!SENDS) return;
        constexpr int WORDS = SLICE / 4, EACH = (TRIPLES * WORDS + THREADS - 1) / THREADS;
        uint4* to = exchange + place(n) * PUBLICATION + rank * WORDS;
#pragma unroll
        for (int turn = 0; turn < EACH; ++turn) {
            const unsigned i = threadIdx.x + turn * THREADS;
            if (i >= (rows + 2) / 3 * WORDS) break;
            const unsigned* three = reinterpret_cast<const unsigned*>(staged) + i / WORDS * 3 * WORDS + i % WORDS;
            st_relaxed_gpu(to + i / WORDS * BLOCKS * WORDS + i % WORDS,
                           make_uint4(three[0], three[WORDS], three[2 * WORDS], stamp(n)));
        }
#endif
    }

#if SCOPE == GRID
    static constexpr int TEAM = 32 * UNIT_TILES;  // threads that receive the same columns
    static constexpr int IN_FLIGHT = 8;           // words that a thread asks for before it looks at them
    static constexpr int PER = (PIECE * 8 + TEAM - 1) / TEAM;  // words of a thread, of three batch rows
    static constexpr bool FILLED = BLOCKS * (SLICE / 4) == K_SPLITS * TILES * 8;  // no columns that are never published

    // give(word, triple, c) for those of this thread's words, from `begin` on, that are of the batch and of the piece; c:
    // columns from its first one.
    template <class Give>
    DEVICE void each_word(int begin, int first, int last, uint4 (&words)[IN_FLIGHT], Give give) const {
#pragma unroll
        for (int triple = 0; triple < TRIPLES; ++triple) {
            if (triple >= (rows + 2) / 3) continue;
#pragma unroll
            for (int f = 0; f < IN_FLIGHT; ++f) {
                const int c = (begin + f) % PER * TEAM;
                const bool within =
                    (PER * TEAM == PIECE * 8 && last - first == PIECE) || member + c < (last - first) * 8;
                if ((begin + f) / PER == triple && within) give(words[f], triple, c);
            }
        }
    }
#endif

    // Wait until the k tiles `first` to `last` are there.
    DEVICE void await(long long n, int first, int last) {
        if (ONLY == PRODUCT || !waits) return;
#if SCOPE == CLUSTER
        mbarrier_wait_cluster(&received[n % 2], n / 2 % 2);
#elif SCOPE == GRID
        // The warps that multiply the same columns receive them: nobody waits for what he doesn't multiply. A word is
        // overwritten two publications later, if at all. No fence is needed for that: its owner stores it after it has
        // seen all of the publication between, which every block stores after it has seen all of this one.
        const uint4* source = in_register(exchange + (place(n) * PUBLICATION + first * 8 + asked));
        unsigned char* to = operand + filled;
#pragma unroll
        for (int begin = 0; begin < TRIPLES * PER; begin += IN_FLIGHT) {
            uint4 got[IN_FLIGHT];
            auto published = [&](int c) { return FILLED || first * 8 + asked + c < BLOCKS * (SLICE / 4); };
            auto read = [&](uint4& word, int triple, int c) {
                word = ld_relaxed_gpu(source + triple * BLOCKS * (SLICE / 4) + c);
            };
            each_word(begin, first, last, got, [&](uint4& word, int triple, int c) {
                if (!FILLED) word = make_uint4(0, 0, 0, 0);
                if (published(c)) read(word, triple, c);
            });
            for (Watchdog watchdog;; watchdog.turn()) {
                unsigned late = 0;
                each_word(begin, first, last, got, [&](uint4& word, int triple, int c) {
                    // Rows that no group has are zeros. They count, as the compiler reads the parts of a word one by one
                    // where it doesn't use them all: data could be older than their stamp.
                    const unsigned none = (triple * 3 + 1 < NB ? 0 : word.y) | (triple * 3 + 2 < NB ? 0 : word.z);
                    if (published(c)) late |= word.w ^ stamp(n) | none;
                });
                if (late == 0) break;
                each_word(begin, first, last, got, [&](uint4& word, int triple, int c) {  // one trip for all late ones
                    if (published(c) && word.w != stamp(n)) read(word, triple, c);
                });
            }
            each_word(begin, first, last, got, [&](uint4& word, int triple, int c) {
                const unsigned data[3] = {word.x, word.y, word.z};
#pragma unroll
                for (int row = 0; row < 3; ++row)
                    if (triple * 3 + row < NB)
                        *reinterpret_cast<unsigned*>(to + c * 4 + (triple * 3 + row) * ROW) = data[row];
            });
        }
        team_sync();  // every thread's words are there
#endif
    }

    DEVICE static long long place(long long n) { return KEEPS ? n : n & 1; }  // n % 2 would ask for the sign
    DEVICE static unsigned stamp(long long n) { return static_cast<unsigned>(n + 1); }

    // The warps that multiply the same columns wait for each other.
    DEVICE void team_sync() {
        if (UNIT_TILES == 1)
            __syncwarp();
        else
            named_barrier_sync(1 + warp % K_SPLITS, 32 * UNIT_TILES);
    }
};
