// persistent_block.cuh: the weights that a block of persistent.cu holds, and the exchange within its group.
#pragma once

// The values that a group exchanges per hidden unit. Backward they are the gradients of the recurrent projections, one
// per gate. In a wavefront the input weights multiply them, too: gradients of input projections that differ come last.
struct Values {
    static constexpr int COUNT_SEPARATE = WAVEFRONT_BACKWARD ? Cell::COUNT_SEPARATE : 0;
    static constexpr int COUNT = BACKWARD ? Cell::G + COUNT_SEPARATE : 1;

    // The gate whose rows of the recurrent, or the input, weights multiply a value; -1: none.
    DEVICE static int gate(int value, bool input) {
        if (value < Cell::G) return input && (Cell::SEPARATE >> value & 1) != 0 ? -1 : value;
        return input ? separate_gate(value - Cell::G) : -1;
    }
    DEVICE static constexpr int separate_gate(int n) {  // the n-th gate whose projections have different gradients
        for (int gate = 0; gate < Cell::G; ++gate)
            if ((Cell::SEPARATE >> gate & 1) != 0 && n-- == 0) return gate;
        return -1;
    }
};

// A warp's part of a matrix: k tiles in registers first, then in shared memory.
struct WeightTile {
    static constexpr int GATE_SETS = BACKWARD ? 1 : Cell::G;
    static constexpr int IN_REGISTERS = Values::COUNT * K_REGISTERS;
    static constexpr int IN_SHARED = Values::COUNT * K_SHARED;
    static constexpr int K_TILES = IN_REGISTERS + IN_SHARED;
    static constexpr int BYTES = WARPS * GATE_SETS * IN_SHARED * 512;  // of the block, in shared memory

    uint4* shared;  // [WARPS][SETS][IN_SHARED][32]
    unsigned registers[GATE_SETS][IN_REGISTERS > 0 ? IN_REGISTERS : 1][4];

    // Load this warp's fragments of R [G, H, H], recurrent or input weights, in pairs of numbers: once per sequence it
    // may be slow, and a layout made beforehand would cost a launch. Registers are filled through `staging` in shared
    // memory: in a loop that is unrolled for registers the compiler would have too many loads in flight.
    template <int STAGING_BYTES>
    DEVICE void load(void* staging, const SCALAR* R, bool input, int H, int rank, int warp, int lane) {
        constexpr int ROOM = STAGING_BYTES / (WARPS * 512), CHUNK = ROOM < IN_REGISTERS ? ROOM : IN_REGISTERS;
        constexpr int STRIDE = CHUNK > 0 ? CHUNK : 1;
        uint4* staged = static_cast<uint4*>(staging) + warp * CHUNK * 32 + lane;  // read back by the lane that wrote it
        shared += warp * GATE_SETS * IN_SHARED * 32 + lane;
#pragma unroll
        for (int r = 0; r < GATE_SETS; ++r) {
#pragma unroll
            for (int j = 0; CHUNK == 0 && j < IN_REGISTERS; ++j)  // no room to stage: straight to registers
                set(registers[r][j], read_fragment(R, input, H, rank, warp, lane, r, j));
#pragma unroll
            for (int first = 0; CHUNK > 0 && first < IN_REGISTERS; first += STRIDE) {
#pragma unroll 4
                for (int j = 0; j < CHUNK; ++j)
                    if (first + j < IN_REGISTERS)
                        staged[j * 32] = read_fragment(R, input, H, rank, warp, lane, r, first + j);
#pragma unroll
                for (int j = 0; j < CHUNK && first + j < IN_REGISTERS; ++j)
                    set(registers[r][first + j], staged[j * 32]);
            }
#pragma unroll 4
            for (int j = 0; j < IN_SHARED; ++j)
                shared[(r * IN_SHARED + j) * 32] = read_fragment(R, input, H, rank, warp, lane, r, IN_REGISTERS + j);
        }
    }

    DEVICE static void set(unsigned to[4], uint4 a) { to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w; }

    // This lane's part of k tile j of gate set r. Operand columns run over blocks, values, units of the block; a k tile
    // is of one value.
    DEVICE static uint4 read_fragment(const SCALAR* R, bool input, int H, int rank, int warp, int lane, int r, int j) {
        const int column = (warp % K_SPLITS * K_TILES + j) * K_TILE_SIZE,
                  within = column % (Values::COUNT * BLOCK_UNITS);
        const int unit0 = rank * BLOCK_UNITS + warp / K_SPLITS * 16,
                  other0 = column / (Values::COUNT * BLOCK_UNITS) * BLOCK_UNITS + within % BLOCK_UNITS;
        const int gate = BACKWARD ? Values::gate(within / BLOCK_UNITS, input) : r;
        using Bits = decltype(bits_of(SCALAR()));
        auto element = [&](int row, int k) -> Bits {
            const int unit = unit0 + row, other = other0 + k;
            if (unit >= H || other >= H || gate < 0) return 0;
            const int at = BACKWARD ? (gate * H + other) * H + unit : (gate * H + unit) * H + other;  // below 2^31
            return reinterpret_cast<const Bits*>(R)[at];
        };
        unsigned a[4];
#if IEEE
        ieee_fragment<Sums<GATE_SETS>::LANE_ROWS>(a, element, lane);
#else
        fragment(a, element, lane, Bits());
#endif
        return make_uint4(a[0], a[1], a[2], a[3]);
    }

    DEVICE void load_fragment(unsigned a[4], int r, int j) const {
        if (j < IN_REGISTERS) {
            for (int i = 0; i < 4; ++i) a[i] = registers[r][j < IN_REGISTERS ? j : 0][i];
        } else {
            const uint4 w = shared[(r * IN_SHARED + j - IN_REGISTERS) * 32];
            a[0] = w.x, a[1] = w.y, a[2] = w.z, a[3] = w.w;
        }
    }
};

// What would take few instructions to compute anew at every time step, in a register; large batches leave none.
DEVICE int kept(int x) { return K_CHUNKS == 1 ? in_register(x) : x; }
DEVICE long long kept(long long x) { return K_CHUNKS == 1 ? in_register(x) : x; }

struct PersistentBlock {
    static constexpr int GATE_SETS = WeightTile::GATE_SETS, VALUES = Values::COUNT, K_TILES = WeightTile::K_TILES;
    static constexpr int K_CHUNK = (K_TILES + K_CHUNKS - 1) / K_CHUNKS;        // k tiles of a warp in one chunk
    static constexpr int SLICE_BYTES = VALUES * BLOCK_UNITS * sizeof(SCALAR);  // that a block sends per batch row
    static constexpr int OPERAND_PITCH =
        K_SPLITS * K_CHUNK * 32 + 16;  // of a batch row: ldmatrix without bank conflicts
    static constexpr int OPERAND_BYTES = BATCH_ROWS * OPERAND_PITCH;
    static constexpr int SUMS_BYTES = K_SPLITS * GATE_SETS * BATCH_ROWS * SUMS_PITCH * 4;
    static constexpr int OPERAND_BUFFERS = SCOPE == CLUSTER ? 2 : 1;  // peers of a cluster store ahead of the reader
    static constexpr int ROW_TRIPLES = (BATCH_ROWS + 2) / 3;          // a word has a flag and 4 bytes of 3 batch rows
    static constexpr long long ROUND_WORDS = ROW_TRIPLES * BLOCKS * (SLICE_BYTES / 4);  // of an exchange round
    static constexpr int STAGED_BYTES = SCOPE == GRID ? ROW_TRIPLES * 3 * SLICE_BYTES : 0;
    static constexpr int BYTES =
        OPERAND_BUFFERS * OPERAND_BYTES + STAGED_BYTES + SUMS_BYTES + WeightTile::BYTES + 16 + UnitReduction::BYTES;
    static constexpr int SECOND_MATRIX_BYTES = !WAVEFRONT ? 0
                                               : BACKWARD ? SUMS_BYTES + WeightTile::BYTES
                                                          : BYTES;  // for the input weights
    static_assert(BYTES + SECOND_MATRIX_BYTES == SHARED_BYTES, "config.py computes the same");
    static_assert(!WAVEFRONT || Levels::COUNT == 0, "a wavefront has no reductions over hidden units");
    static_assert(BLOCKS * SLICE_BYTES <= K_SPLITS * K_TILES * 32, "the warps' k tiles cover what all blocks send");
    static_assert((K_CHUNKS - 1) * K_CHUNK < K_TILES, "no chunk is empty");
    static_assert(SCOPE == GRID || K_CHUNKS == 1, "the buffer that peers store to at any time is whole");
    static_assert(!(WAVEFRONT_BACKWARD || BLOCKS == 1) || K_CHUNKS == 1,
                  "an operand that is multiplied twice, or staged here, is whole");

    unsigned char*
        operand;  // [OPERAND_BUFFERS][BATCH_ROWS][OPERAND_PITCH]: multiplied; in a cluster, one is being received
    unsigned char* staged;  // GRID: [ROW_TRIPLES * 3][SLICE_BYTES], the block's own values, to be sent
    float* partial_sums;    // [K_SPLITS][GATE_SETS][BATCH_ROWS][SUMS_PITCH]
    WeightTile weights;
    int warp, lane, rank;
    // Places of this thread, in registers: the compiler computes what takes few instructions anew at every time step.
    int operand_at;  // bytes of an operand: its lane's part of the warp's first k tile
    int sums_at;     // in partial_sums: its lane's first
    int value_at;    // bytes of an operand: the value of its first element
    int sum_at;      // in partial_sums: the sum of its first element
#if SCOPE == CLUSTER
    int sent_at;         // bytes of an operand: its lane's first word of the block's slice
    int first_peer;      // that its warp sends to
    int received_bytes;  // of a round, from all peers
#endif
    int valid_rows;  // of the batch: the group's other rows aren't exchanged
    UnitReduction unit_reduction;
#if SCOPE == CLUSTER
    Mbarrier* received;  // [2], one for each operand
#elif SCOPE == GRID
    uint4* exchange;      // of a group: two rounds [ROW_TRIPLES][BLOCKS * SLICE_BYTES / 4], or all of them
#endif

    static constexpr bool KEEPS_ALL_ROUNDS = WAVEFRONT && !BACKWARD;  // they are read by another layer
    static constexpr bool SINGLE_BLOCK = BLOCKS == 1;                 // values are staged in the operand itself
    static constexpr bool SENDS = SCOPE == GRID && (!SINGLE_BLOCK || KEEPS_ALL_ROUNDS);

    bool needs_wait;  // for other blocks
#if SCOPE == GRID
    int team_thread;  // among the threads that receive the same columns
    int first_word;   // that this thread receives of a round
    int first_byte;   // of the operand, where it goes
#endif

    DEVICE static long long group_words(long long T) {
        return (KEEPS_ALL_ROUNDS ? T + 1 : 2) * ROUND_WORDS + UnitReduction::EXCHANGE_WORDS;
    }

    // `from`: the group to receive from, its own or that of the layer below. R: see WeightTile; or null.
    DEVICE PersistentBlock(unsigned char* arena, uint4* exchanges, int from, long long T, int rows_left,
                           const SCALAR* R, int H)
        : operand(arena),
          staged(operand + OPERAND_BUFFERS * OPERAND_BYTES),
          partial_sums(reinterpret_cast<float*>(staged + STAGED_BYTES)),
          weights{reinterpret_cast<uint4*>(staged + STAGED_BYTES + SUMS_BYTES), {}},
          warp(threadIdx.x / 32),
          lane(threadIdx.x % 32),
          rank(blockIdx.x % BLOCKS),
          operand_at(kept(warp % K_SPLITS * K_CHUNK * 32 + Sums<GATE_SETS>::template lane_at<OPERAND_PITCH>(lane))),
          value_at(kept(row_of(threadIdx.x) * OPERAND_PITCH + rank * SLICE_BYTES +
                        unit_of(threadIdx.x) * int(sizeof(SCALAR)))),
          sum_at(kept(row_of(threadIdx.x) * SUMS_PITCH + unit_of(threadIdx.x))),
          valid_rows(max(0, min(BATCH_ROWS, rows_left - batch_tile() * BATCH_ROWS))),
          needs_wait(!SINGLE_BLOCK || from != group()),
          unit_reduction(staged + STAGED_BYTES + SUMS_BYTES + WeightTile::BYTES + 16,
                         exchanges + from * group_words(T) + group_words(T) - UnitReduction::EXCHANGE_WORDS) {
        const Corner corner = Sums<GATE_SETS>::corner(lane);
        sums_at = kept((warp % K_SPLITS * GATE_SETS * BATCH_ROWS + corner.column) * SUMS_PITCH + warp / K_SPLITS * 16 +
                       corner.row);
#if SCOPE == CLUSTER
        sent_at = kept(word_at(lane));
        first_peer = kept((rank + 1 + warp) % BLOCKS);
        received_bytes = kept((BLOCKS - 1) * valid_rows * SLICE_BYTES);
#endif
        constexpr int FIRST_BYTES = OPERAND_BUFFERS * OPERAND_BYTES + STAGED_BYTES + SUMS_BYTES;
        if (R != nullptr) weights.template load<FIRST_BYTES>(operand, R, from != group(), H, rank, warp, lane);
        __syncthreads();  // weights have left the memory that is zeroed now
        for (int i = threadIdx.x; i < (OPERAND_BUFFERS * OPERAND_BYTES + STAGED_BYTES) / 16; i += THREADS)
            reinterpret_cast<uint4*>(operand)[i] = make_uint4(0, 0, 0, 0);  // padding stays zero
#if SCOPE == CLUSTER
        received = reinterpret_cast<Mbarrier*>(staged + STAGED_BYTES + SUMS_BYTES + WeightTile::BYTES);
        if (threadIdx.x == 0) {
            mbarrier_init(&received[0], 1);
            mbarrier_init(&received[1], 1);
            fence_mbarrier_init();
        }
        cluster_sync();  // mbarriers are initialized and operands zero before a peer stores
#else
        __syncthreads();  // operands are zero before they are filled
#endif
#if SCOPE == GRID
        exchange = exchanges + from * group_words(T);
        team_thread = warp / K_SPLITS * 32 + lane;
        const int column = warp % K_SPLITS * K_TILES * 8 + team_thread;
        first_word = K_CHUNKS == 1 ? in_register(column) : column;  // large batches, in chunks, leave no register
        first_byte = K_CHUNKS == 1 ? first_word * 4 : warp % K_SPLITS * K_CHUNK * 32 + team_thread * 4;
#endif
    }

    // In the following n is the number of an exchange round, from 0.

    // Multiply what round n sends. `partial_sums` has the sums, one per K split, for `split_k_sum` to add.
    DEVICE void receive_and_multiply(long long n) {
        Sums<GATE_SETS> sums;
#pragma unroll
        for (int chunk = 0; chunk < K_CHUNKS; ++chunk) {
            const int first = chunk * K_CHUNK, last = min(first + K_CHUNK, K_TILES);
            if (chunk > 0) team_sync();  // the previous chunk has been multiplied
            receive(n, first, last);
            multiply(n, first, last, weights, sums);
        }
        store_partial_sums(sums, partial_sums);
    }

    // Multiply the operand of `receive_and_multiply` by another matrix. `others` has the sums.
    DEVICE void multiply_by(long long n, const WeightTile& matrix, float* others) const {
        Sums<GATE_SETS> sums;
        multiply(n, 0, K_TILES, matrix, sums);
        store_partial_sums(sums, others);
    }

    DEVICE void multiply(long long n, int first, int last, const WeightTile& matrix, Sums<GATE_SETS>& sums) const {
        if (PROFILE_ONLY == EXCHANGE) return;
        const unsigned char* tile = operand + buffer_of(n) * OPERAND_BYTES + operand_at;
        sums.template add<OPERAND_PITCH>(tile, first, last,
                                         [&](unsigned a[4], int r, int j) { matrix.load_fragment(a, r, j); });
    }

    DEVICE void store_partial_sums(const Sums<GATE_SETS>& sums, float* to) const {
        to += sums_at;
        sums.finish(lane, [&](int r, int row, int column, float sum) {
            to[(r * BATCH_ROWS + column) * SUMS_PITCH + row] = sum;
        });
        __syncthreads();  // all partial sums are stored, and the operand has been multiplied
    }

    // Of this thread's element k.
    DEVICE float split_k_sum(int r, int k) const { return add_partial_sums(partial_sums, r, k); }
    DEVICE float add_partial_sums(const float* from, int r, int k) const {
        from += sum_at + (r * BATCH_ROWS + k * ROW_STRIDE) * SUMS_PITCH;
        float total = from[0];
#pragma unroll
        for (int split = 1; split < K_SPLITS; ++split) total += from[split * GATE_SETS * BATCH_ROWS * SUMS_PITCH];
        return total;
    }

    // Stage a value of this thread's element k, to be sent to the other blocks.
    DEVICE void stage(long long n, int value, int k, float x) {
        const SCALAR stored = encoded(x, SCALAR());
        const int row = row_of(threadIdx.x) + k * ROW_STRIDE;
        if (SENDS)
            reinterpret_cast<SCALAR*>(staged)[(row * VALUES + value) * BLOCK_UNITS + unit_of(threadIdx.x)] = stored;
        if (SCOPE == GRID && !SINGLE_BLOCK) return;
        unsigned char* first = operand + buffer_of(n) * OPERAND_BYTES + value_at;
        reinterpret_cast<SCALAR*>(first + k * ROW_STRIDE * OPERAND_PITCH)[value * BLOCK_UNITS] = stored;
    }

    // Word i of the block's slice in an operand, in bytes.
    DEVICE int word_at(int i) const {
        return i / (SLICE_BYTES / 16) * OPERAND_PITCH + i % (SLICE_BYTES / 16) * 16 + rank * SLICE_BYTES;
    }

    // Send the block's slice to the others, once all its threads have staged.
    DEVICE void send(long long n) {
        __syncthreads();  // the slice is complete, and the partial sums have been read
        if (PROFILE_ONLY == PRODUCT) return;
#if SCOPE == CLUSTER
        const int buffer = kept(buffer_of(n));
        if (threadIdx.x == 0) mbarrier_arrive_expect_tx(&received[buffer], received_bytes);
        unsigned char* slice = operand + buffer * OPERAND_BYTES;
        constexpr int EACH = (BATCH_ROWS * (SLICE_BYTES / 16) + 31) / 32;  // words of a lane
#pragma unroll
        for (int turn = 0; turn < EACH; ++turn) {
            const int i = lane + turn * 32;
            constexpr bool WHOLE_ROWS = 512 % SLICE_BYTES == 0;  // has a turn
            uint4* mine = reinterpret_cast<uint4*>(
                slice + (WHOLE_ROWS ? sent_at + turn * (512 / SLICE_BYTES) * OPERAND_PITCH : word_at(i)));
            if (i >= valid_rows * (SLICE_BYTES / 16)) break;
            const uint4 value = *mine;
#pragma unroll
            for (int first = 0; first < BLOCKS - 1; first += WARPS) {
                const int peer = first + warp;  // warps send to different peers at a time
                if (peer < BLOCKS - 1)
                    st_async(mine, value, &received[buffer], (first_peer + first) % static_cast<unsigned>(BLOCKS));
            }
        }
#elif SCOPE == GRID
        if (!SENDS) return;
        constexpr int WORDS = SLICE_BYTES / 4, EACH = (ROW_TRIPLES * WORDS + THREADS - 1) / THREADS;
        uint4* to = exchange + slot(n) * ROUND_WORDS + rank * WORDS;
#pragma unroll
        for (int turn = 0; turn < EACH; ++turn) {
            const unsigned i = threadIdx.x + turn * THREADS;
            if (i >= (valid_rows + 2) / 3 * WORDS) break;
            const unsigned* three = reinterpret_cast<const unsigned*>(staged) + i / WORDS * 3 * WORDS + i % WORDS;
            st_relaxed_gpu(to + i / WORDS * BLOCKS * WORDS + i % WORDS,
                           make_uint4(three[0], three[WORDS], three[2 * WORDS], flag(n)));
        }
#endif
    }

#if SCOPE == GRID
    static constexpr int TEAM = 32 * UNIT_TILES;  // threads that receive the same columns
    static constexpr int IN_FLIGHT = 8;           // words that a thread loads before it looks at their flags
    static constexpr int WORDS_PER_THREAD = (K_CHUNK * 8 + TEAM - 1) / TEAM;  // of three batch rows each
    static constexpr bool NO_PADDING = BLOCKS * (SLICE_BYTES / 4) == K_SPLITS * K_TILES * 8;  // every column is sent

    // give(word, triple, c) for those of this thread's words, from `begin` on, that are of the batch and of the chunk;
    // c: columns from its first one.
    template <class Give>
    DEVICE void for_each_word(int begin, int first, int last, uint4 (&words)[IN_FLIGHT], Give give) const {
#pragma unroll
        for (int triple = 0; triple < ROW_TRIPLES; ++triple) {
            if (triple >= (valid_rows + 2) / 3) continue;
#pragma unroll
            for (int f = 0; f < IN_FLIGHT; ++f) {
                const int c = (begin + f) % WORDS_PER_THREAD * TEAM;
                const bool within = (WORDS_PER_THREAD * TEAM == K_CHUNK * 8 && last - first == K_CHUNK) ||
                                    team_thread + c < (last - first) * 8;
                if ((begin + f) / WORDS_PER_THREAD == triple && within) give(words[f], triple, c);
            }
        }
    }
#endif

    // Wait for the k tiles `first` to `last`.
    DEVICE void receive(long long n, int first, int last) {
        if (PROFILE_ONLY == PRODUCT || !needs_wait) return;
#if SCOPE == CLUSTER
        mbarrier_wait_cluster(&received[buffer_of(n)], n >> 1 & 1);
#elif SCOPE == GRID
        // The warps that multiply the same columns receive them, so a warp waits for no others. A word is overwritten
        // two rounds later, if at all. That needs no fence: its owner stores it after it has received all of the round
        // between, which every block sends after it has received all of this one.
        const uint4* source = in_register(exchange + (slot(n) * ROUND_WORDS + first * 8 + first_word));
        unsigned char* to = operand + first_byte;
#pragma unroll
        for (int begin = 0; begin < ROW_TRIPLES * WORDS_PER_THREAD; begin += IN_FLIGHT) {
            uint4 got[IN_FLIGHT];
            auto is_sent = [&](int c) { return NO_PADDING || first * 8 + first_word + c < BLOCKS * (SLICE_BYTES / 4); };
            auto read = [&](uint4& word, int triple, int c) {
                word = ld_relaxed_gpu(source + triple * BLOCKS * (SLICE_BYTES / 4) + c);
            };
            for_each_word(begin, first, last, got, [&](uint4& word, int triple, int c) {
                if (!NO_PADDING) word = make_uint4(0, 0, 0, 0);
                if (is_sent(c)) read(word, triple, c);
            });
            for (Watchdog watchdog;; watchdog.turn()) {
                unsigned late = 0;
                for_each_word(begin, first, last, got, [&](uint4& word, int triple, int c) {
                    // Rows past BATCH_ROWS are zero. They are tested, since the compiler splits the load of a word that
                    // isn't used as a whole: its data could then be older than its flag.
                    const unsigned none =
                        (triple * 3 + 1 < BATCH_ROWS ? 0 : word.y) | (triple * 3 + 2 < BATCH_ROWS ? 0 : word.z);
                    if (is_sent(c)) late |= word.w ^ flag(n) | none;
                });
                if (late == 0) break;
                for_each_word(begin, first, last, got,
                              [&](uint4& word, int triple, int c) {  // reload all late ones together
                                  if (is_sent(c) && word.w != flag(n)) read(word, triple, c);
                              });
            }
            for_each_word(begin, first, last, got, [&](uint4& word, int triple, int c) {
                const unsigned data[3] = {word.x, word.y, word.z};
#pragma unroll
                for (int row = 0; row < 3; ++row)
                    if (triple * 3 + row < BATCH_ROWS)
                        *reinterpret_cast<unsigned*>(to + c * 4 + (triple * 3 + row) * OPERAND_PITCH) = data[row];
            });
        }
        team_sync();  // the words of all its threads are stored
#endif
    }

    DEVICE static int buffer_of(long long n) { return OPERAND_BUFFERS == 1 ? 0 : static_cast<int>(n & 1); }
    DEVICE static long long slot(long long n) { return KEEPS_ALL_ROUNDS ? n : n & 1; }  // n % 2 would test the sign
    DEVICE static unsigned flag(long long n) { return static_cast<unsigned>(n + 1); }

    // Synchronize the warps that multiply the same columns.
    DEVICE void team_sync() {
        if (UNIT_TILES == 1)
            __syncwarp();
        else
            named_barrier_sync(1 + warp % K_SPLITS, 32 * UNIT_TILES);
    }
};
