// sequence.cpp: a whole sequence forward or backward in one call, for any cell: products, time loop, threads; then the
// gradients of inputs and weights.
//
// A product is a tile of M batch rows x N blocks of V hidden units x G gates of accumulators in registers. Weights are
// packed so that a tile reads them one after the other: panels of [K][G][V], one for each block of units. What a tile
// gives stays in the nearest cache, where the cell's elementwise code (cell.cpp) takes it up before the next block.
// All rows go through a panel by pieces of K that fit into L1.
//
// Every sum runs over the k of a piece in order, by fused multiply-additions from zero on, and then is added to the bias
// and the pieces before: its bits depend neither on the tile nor on how many rows, time steps or threads there are, and
// its error grows with the length of a piece rather than with K.
//
// Heads and runs know nothing of each other: where there are enough of them, each is one thread's, whose cache keeps its
// weights. Else threads have batch rows of their own and never wait; with fewer rows than threads they have units of
// their own, and wait for each other after every part of a time step. One that has nothing to do sleeps.
//
// Why not the simpler way: one large product for the inputs of all time steps would write T B G H values to memory and read
// them again; here it is made for as many time steps as give a product enough rows.
#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

constexpr int ACCUMULATORS = REGISTERS == 32 ? 24 : 12;  // registers of a tile; the others hold weights and inputs
constexpr int COLUMNS = 4;                               // vectors side by side of a full tile: gates, or blocks of units
constexpr int MOST_BLOCKS = 8;                           // of units side by side, where rows are few
constexpr Index PIECE = 128;                             // of K: 4 vectors of it take half of an L1 of 32 KB or more
constexpr Index LINE = 64 / sizeof(scalar);              // of K: a line of the cache, which is gone when its set fills up
constexpr Index CHUNK_ROWS = 48;                         // of the products of many time steps: at least, or at once
constexpr Index FEW_ROWS = 2;                            // whose product takes less time than to pack the weights for it
constexpr int PAIRED = 2;                                // columns of a tile in place: more would share a set of the cache

DEVICE Index min(Index a, Index b) { return a < b ? a : b; }
DEVICE Index max(Index a, Index b) { return a > b ? a : b; }

// ---- Memory --------------------------------------------------------------------------------------------------------

struct Scratch {  // of `scalar`, on cache lines of its own; none of size 0, or where there is no memory
    scalar* data;
    bool failed;
    explicit Scratch(Index size) : data(nullptr), failed(false) {
        void* memory = nullptr;
        if (size > 0) failed = posix_memalign(&memory, 64, size * sizeof(scalar)) != 0;
        if (!failed) data = static_cast<scalar*>(memory);
    }
    Scratch(const Scratch&) = delete;
    ~Scratch() { free(data); }
};

// ---- Threads -------------------------------------------------------------------------------------------------------

// Threads that sleep until a call wakes them.
struct Pool {
    static constexpr int MOST = 64;
    pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t wake = PTHREAD_COND_INITIALIZER, done = PTHREAD_COND_INITIALIZER;
    int started = 0, requested = 0, running = 0;
    uint64_t call = 0, joined[MOST] = {};  // the call that was the last one when a thread was started
    void (*body)(void*, int) = nullptr;
    void* context = nullptr;
};
static Pool pool;

static void* serve(void* argument) {
    const int own = static_cast<int>(reinterpret_cast<intptr_t>(argument));
    pthread_mutex_lock(&pool.mutex);
    for (uint64_t seen = pool.joined[own];;) {
        while (pool.call == seen || own >= pool.requested) {
            seen = pool.call;
            pthread_cond_wait(&pool.wake, &pool.mutex);
        }
        seen = pool.call;
        pthread_mutex_unlock(&pool.mutex);
        pool.body(pool.context, own);
        pthread_mutex_lock(&pool.mutex);
        if (--pool.running == 0) pthread_cond_signal(&pool.done);
    }
    return nullptr;
}

// Start the pool's threads until there are so many, the caller included. How many there are.
static int start(int requested) {
    sigset_t every, before;
    sigfillset(&every);
    pthread_sigmask(SIG_SETMASK, &every, &before);  // signals are for the threads of the process itself
    while (pool.started + 1 < requested) {
        const int own = pool.started + 1;
        pthread_t thread;
        pool.joined[own] = pool.call;
        if (pthread_create(&thread, nullptr, serve, reinterpret_cast<void*>(static_cast<intptr_t>(own))) != 0) break;
        pthread_detach(thread);
        pool.started = own;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return static_cast<int>(min(requested, pool.started + 1));
}

// The OpenMP that the caller's library computes with, by the interface of GNU's, which LLVM's and Intel's have, too.
static struct {
    void (*parallel)(void (*body)(void*), void* context, unsigned threads, unsigned flags);
    int (*size)();
    int (*rank)();
    bool sought, lost;

    bool is_loaded() {
        if (!sought) {
            find(parallel, "GOMP_parallel"), find(size, "omp_get_num_threads"), find(rank, "omp_get_thread_num");
            sought = true;
        }
        return parallel && size && rank && !lost;
    }
    template <class Function>
    static void find(Function& function, const char* name) {
        function = reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
    }
} openmp;

static pthread_mutex_t several = PTHREAD_MUTEX_INITIALIZER;  // is held by the call that runs on several threads

// A child has no threads, and GNU's OpenMP would wait for those that its parent had.
__attribute__((constructor)) static void prepare_fork() {
    pthread_atfork(nullptr, nullptr, [] {
        pool = Pool();
        several = PTHREAD_MUTEX_INITIALIZER;
        openmp.lost = true;
    });
}

// Threads of a call, as many as are requested and there are; one alone where a concurrent call has some.
//
// They are OpenMP's where the caller's library has it: after an operation of that library, its threads spin for
// milliseconds on the cores that others would have to wait for. Else they are the pool's.
class Workers {
    bool by_openmp = false;

public:
    int count = 1;

    Workers(Index requested, bool prefer_openmp) {
        if (requested < 2 || pthread_mutex_trylock(&several) != 0) return;
        by_openmp = prefer_openmp && openmp.is_loaded();
        count = static_cast<int>(min(requested, Pool::MOST));
        if (!by_openmp) count = start(count);
        if (count == 1) pthread_mutex_unlock(&several);
    }
    Workers(const Workers&) = delete;
    ~Workers() {
        if (count > 1) pthread_mutex_unlock(&several);
    }

    // Have body(0) to body(count - 1) run at the same time; the caller is thread 0. False where that many can't be had.
    template <class Body>
    bool run(Body& body) {
        if (count == 1) return body(0), true;
        if (by_openmp) {  // gives fewer, for example, within another parallel region; then none of them begins
            bool done = false;
            auto member = [&] {
                if (openmp.size() != count) return;
                const int own = openmp.rank();
                body(own);
                if (own == 0) done = true;
            };
            openmp.parallel([](void* context) { (*static_cast<decltype(member)*>(context))(); }, &member, count, 0);
            if (done) return true;
        }
        if (start(count) < count) return false;
        pthread_mutex_lock(&pool.mutex);
        pool.body = [](void* context, int thread) { (*static_cast<Body*>(context))(thread); };
        pool.context = &body;
        pool.running = count - 1;
        pool.requested = count;
        ++pool.call;
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.mutex);
        body(0);
        pthread_mutex_lock(&pool.mutex);
        while (pool.running > 0) pthread_cond_wait(&pool.done, &pool.mutex);
        pthread_mutex_unlock(&pool.mutex);
        return true;
    }
};

// All of a call's threads wait here for each other, many times.
struct Barrier {
    int threads;
    int arrived = 0, round = 0;
    void wait() {
        if (threads == 1) return;
        const int now = __atomic_load_n(&round, __ATOMIC_RELAXED);
        if (__atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL) == threads) {
            __atomic_store_n(&arrived, 0, __ATOMIC_RELAXED);
            __atomic_store_n(&round, now + 1, __ATOMIC_RELEASE);
            return;
        }
        for (int turns = 0; __atomic_load_n(&round, __ATOMIC_ACQUIRE) == now; ++turns) {
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
            if (turns > 4000) sched_yield();  // its thread may need this core
        }
    }
};

// What a thread does: batch rows [b0, b1), and of `blocks` blocks those from first to last.
struct Part {
    Index b0, b1;
    int thread, threads;  // that share these rows
    Index first(Index blocks) const { return blocks * thread / threads; }
    Index last(Index blocks) const { return blocks * (thread + 1) / threads; }
};

static Part part_of(int thread, int threads, Index B, bool by_rows) {
    if (!by_rows) return {0, B, thread, threads};
    return {B * thread / threads, B * (thread + 1) / threads, 0, 1};
}

// ---- Heads ---------------------------------------------------------------------------------------------------------

template <class T>
DEVICE void skip(T*& array, Index elements) {
    if (array) array += elements;
}

// Have body(head) for every head of so many runs, of the same sizes: one after the other, each by threads of its own, or
// for threads > 1 each on one thread. 0, or 1 where one gives that.
template <class Problem>
static int each_head(const Problem* runs, Index count, Index threads, int (*body)(const Problem&)) {
    const Index heads = runs->heads, all = count * heads;
    Index next = 0;
    int failed = 0;
    auto work = [&](int) {
        for (Index k; (k = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < all;)
            if (body(head(runs[k / heads], k % heads))) __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
    };
    Workers workers(min(threads, all), runs->openmp);
    return workers.run(work) ? failed : 1;
}

// ---- Products ------------------------------------------------------------------------------------------------------

#if !defined(__clang__)
// Replace a and b by two shuffles of them: lane j of a becomes lane first(j), lane j of b lane second(j), where lanes 0 to
// V - 1 are those of a, and V to 2 V - 1 those of b.
template <class First, class Second>
DEVICE void shuffle_pair(vec& a, vec& b, First first, Second second) {
    ints of_a, of_b;
    for (int j = 0; j < V; ++j) of_a[j] = first(j), of_b[j] = second(j);
    const vec new_a = __builtin_shuffle(a, b, of_a);
    b = __builtin_shuffle(a, b, of_b), a = new_a;
}

// Parts of BIT lanes change places between rows whose numbers differ in BIT, then those twice as large.
template <int BIT>
DEVICE void exchange_parts(vec (&rows)[V]) {
    if constexpr (BIT < V) {
#pragma GCC unroll 16
        for (int i = 0; i < V; ++i)
            if (!(i & BIT))
                shuffle_pair(rows[i], rows[i + BIT], [](int j) { return j & BIT ? V + j - BIT : j; },
                             [](int j) { return j & BIT ? V + j : j + BIT; });
        exchange_parts<2 * BIT>(rows);
    }
}
#endif

// `count` rows of V elements, `row` apart, and zeros become V columns: first within parts of 16 bytes, by words of every
// instruction set, then such parts change places between rows whose numbers differ in one bit.
DEVICE void transpose(const scalar* from, Index row, int count, vec (&rows)[V]) {
#if defined(__clang__)
    for (int k = 0; k < V; ++k)
        for (int i = 0; i < V; ++i) rows[k][i] = i < count ? from[i * row + k] : 0;
#else
    constexpr int PART = 16 / sizeof(scalar);
#pragma GCC unroll 16
    for (int i = 0; i < V; ++i) rows[i] = i < count ? load(from + i * row) : vec{};
#pragma GCC unroll 16
    for (int i = 0; i < V; i += 2)  // a0 b0 a1 b1, a2 b2 a3 b3
        shuffle_pair(rows[i], rows[i + 1], [](int j) { return j % 2 * V + j / PART * PART + j % PART / 2; },
                 [](int j) { return j % 2 * V + j / PART * PART + j % PART / 2 + PART / 2; });
    if constexpr (PART == 4)
#pragma GCC unroll 16
        for (int i = 0; i < V; i += 4) {  // a0 b0 c0 d0, a1 b1 c1 d1, ...
            const auto low = [](int j) { return j % 4 / 2 * V + j / 4 * 4 + j % 2; };
            const auto high = [](int j) { return j % 4 / 2 * V + j / 4 * 4 + j % 2 + 2; };
            shuffle_pair(rows[i], rows[i + 2], low, high), shuffle_pair(rows[i + 1], rows[i + 3], low, high);
            const vec second = rows[i + 2];
            rows[i + 2] = rows[i + 1], rows[i + 1] = second;
        }
    exchange_parts<PART>(rows);
#endif
}

DEVICE void transpose(const scalar* from, Index row, scalar* to, Index column) {
    vec columns[V];
    transpose(from, row, V, columns);
#pragma GCC unroll 16
    for (int k = 0; k < V; ++k) store(to + k * column, columns[k]);
}

// Weights, and panels of them as a product reads them: [blocks][K][G][V] from block `begin` on, further lanes zero.
// Element (g, unit, k) lies at from + g * of_gate + unit * of_unit + place(k) * of_k; of_unit or of_k is 1, and where k has
// places of its own of_unit.
struct Matrix {
    Index units, K, G;
    const scalar* from;  // null: there are none
    Index of_gate, of_unit, of_k;
    scalar* panels = nullptr;
    Index begin = 0;
    Index span = K, apart = K;  // every `span` of K begin so far apart: units of a head are so in gates of all heads

    Index place(Index k) const { return span == apart ? k : k / span * apart + k % span; }
    Index size(Index blocks) const { return from ? blocks * K * G * V : 0; }
    scalar* panel(Index u) const { return panels + (u - begin) * K * G * V; }

    void pack(Index u0, Index u1) {
        for (Index u = u0; from && u < u1; ++u) {
            const int lanes = lanes_of(u, units);
            for (Index g = 0; g < G; ++g) {
                const scalar* source = from + g * of_gate + u * V * of_unit;
                scalar* to = panel(u) + g * V;
                if (of_unit == 1) {
                    for (Index k = 0; k < K; ++k) store(to + k * G * V, load(source + place(k) * of_k, lanes));
                    continue;
                }
                Index k = 0;
                for (; of_k == 1 && lanes == V && k + V <= K; k += V) transpose(source + k, of_unit, to + k * G * V, G * V);
                for (; k < K; ++k)
                    for (int i = 0; i < V; ++i) to[k * G * V + i] = i < lanes ? source[i * of_unit + k * of_k] : 0;
            }
        }
    }

    // Panels [u0, u1) in the place of those before: weights that are used once go no further than the cache.
    void repack(Index u0, Index u1) {
        begin = u0;
        pack(u0, u1);
    }
};

// out[m][n][C vectors] = (start, or what is there) + sum over k of rows[m][k] * panel n [k][C vectors].
// step: from one k to the next, of a panel; next: from one panel to the next; both in elements.
template <int M, int N, int C>
static void tile(const scalar* const* rows, const scalar* panel, Index step, Index next, Index K, const scalar* start,
                 scalar* out, Index out_row, Index out_block) {
    vec sum[M][N][C];
    const scalar* in[M];
    for (int m = 0; m < M; ++m) {
        in[m] = rows[m];
        for (int n = 0; n < N; ++n)
            for (int c = 0; c < C; ++c) sum[m][n][c] = vec{};
    }
#pragma GCC unroll 2
    for (Index k = 0; k < K; ++k, panel += step) {
        if constexpr (M <= N * C) {  // what there is less of stays in registers for this k
            vec value[M];
            for (int m = 0; m < M; ++m) value[m] = all(in[m][k]);
            for (int n = 0; n < N; ++n)
                for (int c = 0; c < C; ++c) {
                    const vec weight = load(panel + n * next + c * V);
                    for (int m = 0; m < M; ++m) sum[m][n][c] = fma(value[m], weight, sum[m][n][c]);
                }
        } else {
            vec weight[N][C];
            for (int n = 0; n < N; ++n)
                for (int c = 0; c < C; ++c) weight[n][c] = load(panel + n * next + c * V);
            for (int m = 0; m < M; ++m) {
                const vec value = all(in[m][k]);
                for (int n = 0; n < N; ++n)
                    for (int c = 0; c < C; ++c) sum[m][n][c] = fma(value, weight[n][c], sum[m][n][c]);
            }
        }
    }
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n)
            for (int c = 0; c < C; ++c) {
                scalar* to = out + m * out_row + n * out_block + c * V;
                store(to, load(start ? start + n * out_block + c * V : to) + sum[m][n][c]);
            }
}

typedef void (*Tile)(const scalar* const*, const scalar*, Index, Index, Index, const scalar*, scalar*, Index, Index);

// The rows of a full tile of C vectors: such that about COLUMNS vectors stand side by side.
DEVICE constexpr int full_rows(int C) { return C >= 3 ? ACCUMULATORS / C : ACCUMULATORS / COLUMNS; }

template <int M, int N, int C>
static Tile tile_of_blocks(int& blocks) {  // as many as there are registers for, at most `blocks`
    if constexpr (N == 1) {
        blocks = 1;
        return tile<M, 1, C>;
    } else {
        if constexpr (M * N * C <= ACCUMULATORS)
            if (blocks >= N) {
                blocks = N;
                return tile<M, N, C>;
            }
        return tile_of_blocks<M, N / 2, C>(blocks);
    }
}

template <int M, int C>
static Tile tile_of_rows(int rows, int& blocks) {
    if constexpr (M > 1)
        if (rows < M) return tile_of_rows<M - 1, C>(rows, blocks);
    return tile_of_blocks<M, MOST_BLOCKS, C>(blocks);
}

static Tile tile_for(int rows, int columns, int& blocks) {
    if (columns == 1) return tile_of_rows<full_rows(1), 1>(rows, blocks);
    if (columns == 2) return tile_of_rows<full_rows(2), 2>(rows, blocks);
    if (columns == 3) return tile_of_rows<full_rows(3), 3>(rows, blocks);
    return tile_of_rows<full_rows(4), 4>(rows, blocks);
}

// The same for `count` rows, at most those of a full tile, gates [first, last), and blocks [u, u + blocks) of a piece of K
// from k on.
// start: null adds to what is there.
static void compute(const Matrix& w, Index first, Index last, const scalar* const* rows, int count, Index u, int blocks,
                    Index k, Index piece, const scalar* start, scalar* out, Index out_row) {
    const Index block = w.G * V;
    for (Index g = first; g < last; g += COLUMNS) {
        const int columns = static_cast<int>(min(COLUMNS, last - g));
        for (int n = 0, some; n < blocks; n += some) {
            some = blocks - n;
            const Tile tile = tile_for(count, columns, some);
            tile(rows, w.panel(u + n) + (k * w.G + g) * V, block, w.K * block, piece,
                 start ? start + (u + n) * block + g * V : nullptr, out + n * block + g * V, out_row, block);
        }
    }
}

// How R rows of a product of gates [first, last) are cut: into tiles of about as many rows each, and so many blocks of units
// side by side.
struct Cut {
    Index first, last, rows, turns;
    int blocks;
    Cut(Index G, Index R) : Cut(0, G, R) {}
    Cut(Index first, Index last, Index R) : first(first), last(last), rows(R) {
        const int columns = static_cast<int>(min(last - first, COLUMNS)), full = full_rows(columns);
        turns = (R + full - 1) / full;
        blocks = MOST_BLOCKS;
        tile_for(turns ? static_cast<int>((R + turns - 1) / turns) : full, columns, blocks);
    }
};

// Blocks [u, u1), at most those of the cut, of a product for all its rows; row(r) is where the K inputs of row r lie.
// start: [blocks][G][V], the bias. out: [rows][u1 - u][G][V], of rows out_row apart; only gates of the cut are written.
// k0, k1: of K only those from k0 to k1; the others of the inputs are zero.
template <class Row>
static void multiply(const Matrix& w, const Cut& cut, Index u, Index u1, Row row, const scalar* start, scalar* out,
                     Index out_row, Index k0, Index k1) {
    Index piece;
    for (Index k = k0; k == k0 || k < k1; k += max(piece, 1)) {
        piece = min(PIECE, min(k1 - k, w.span - k % max(w.span, 1)));
        for (Index turn = 0; turn < cut.turns; ++turn) {
            const Index first = cut.rows * turn / cut.turns, last = cut.rows * (turn + 1) / cut.turns;
            const scalar* rows[ACCUMULATORS];
            for (Index r = first; r < last; ++r) rows[r - first] = row(r) + w.place(k);
            compute(w, cut.first, cut.last, rows, static_cast<int>(last - first), u, static_cast<int>(u1 - u), k, piece,
                    k == k0 ? start : nullptr, out + first * out_row, out_row);
        }
    }
}

template <class Row>
static void multiply(const Matrix& w, const Cut& cut, Index u, Index u1, Row row, const scalar* start, scalar* out,
                     Index out_row) {
    multiply(w, cut, u, u1, row, start, out, out_row, 0, w.K);
}

// M rows of a gate's blocks [u, u + C), by weights that aren't packed: every square of V units and V of K is turned in
// registers. of_unit: from one unit to the next.
template <int M, int C>
static void tile_in_place(const scalar* const* rows, const scalar* weights, int lanes, Index of_unit, Index K,
                          const scalar* start, scalar* out, Index out_row, Index block) {
    const int units = C > 1 ? V : lanes;
    vec total[C][M];
    for (int c = 0; c < C; ++c)
        for (int m = 0; m < M; ++m) total[c][m] = load(start + c * block);
    for (Index begin = 0; begin == 0 || begin < K; begin += PIECE) {  // of no K too: -0 becomes 0
        const Index end = min(K, begin + PIECE);
        vec sum[C][M] = {};
        for (Index line = begin; line < end; line += LINE)
            for (int c = 0; c < C; ++c) {
                const scalar* from = weights + c * V * of_unit;
                Index k = line;
                for (; k + V <= min(end, line + LINE); k += V) {
                    vec weight[V];
                    transpose(from + k, of_unit, units, weight);
#pragma GCC unroll 16
                    for (int i = 0; i < V; ++i)
                        for (int m = 0; m < M; ++m) sum[c][m] = fma(all(rows[m][k + i]), weight[i], sum[c][m]);
                }
                for (; k < min(end, line + LINE); ++k) {
                    vec weight{};
                    for (int i = 0; i < units; ++i) weight[i] = from[i * of_unit + k];
                    for (int m = 0; m < M; ++m) sum[c][m] = fma(all(rows[m][k]), weight, sum[c][m]);
                }
            }
        for (int c = 0; c < C; ++c)
            for (int m = 0; m < M; ++m) total[c][m] += sum[c][m];
    }
    for (int c = 0; c < C; ++c)
        for (int m = 0; m < M; ++m) store(out + c * block + m * out_row, total[c][m]);
}

// As `multiply`, with the same bits, for at most FEW_ROWS rows.
template <class Row>
static void multiply_in_place(const Matrix& w, const Cut& cut, Index u, Index u1, Row row, const scalar* start, scalar* out,
                              Index out_row) {
    const Index block = w.G * V;
    const scalar* rows[FEW_ROWS] = {row(0), row(cut.rows - 1)};
    for (Index g = cut.first; g < cut.last; ++g)
        for (Index n = u, some; n < u1; n += some) {
            some = n + PAIRED <= min(u1, w.units / V) ? PAIRED : 1;
            const auto tile = some > 1 ? (cut.rows > 1 ? tile_in_place<2, PAIRED> : tile_in_place<1, PAIRED>)
                                       : (cut.rows > 1 ? tile_in_place<2, 1> : tile_in_place<1, 1>);
            tile(rows, w.from + g * w.of_gate + n * V * w.of_unit, lanes_of(n, w.units), w.of_unit, w.K,
                 start + n * block + g * V, out + (n - u) * block + g * V, out_row, block);
        }
}

// Go through blocks [u0, u1) by as many as the cut has side by side: body(u, u').
template <class Body>
DEVICE void each_blocks(const Cut& cut, Index u0, Index u1, Body body) {
    for (Index u = u0; u < u1; u += cut.blocks) body(u, min(u1, u + cut.blocks));
}

// Elements of a buffer for R rows of a product of gates [first, last) that is read before the next blocks are computed; or
// for one row less, as a thread may have, and then perhaps more blocks side by side.
DEVICE Index scratch_elements(Index first, Index last, Index G, Index R) {
    const auto of_rows = [=](Index rows) { return rows * Cut(first, last, rows).blocks * G * V; };
    return max(of_rows(R), of_rows(max(R - 1, 0)));
}
DEVICE Index scratch_elements(Index G, Index R) { return scratch_elements(0, G, G, R); }

// ---- Forward -------------------------------------------------------------------------------------------------------

// Starts of products, [blocks][G][V], zero without a bias: of the input projection x, the recurrent one h, and of h's own.
struct Starts {
    Index G, blocks, outputs;
    scalar *x, *h, *projection;
    Starts(const Forward& f, scalar* at)
        : G(f.cell->G), blocks(blocks_of(f.D)), outputs(f.W_hr ? blocks_of(f.Q) : 0), x(at), h(x + blocks * G * V),
          projection(h + blocks * G * V) {}
    Index size() const { return (2 * blocks * G + outputs) * V; }

    // Where a gate's parts just meet as a sum, the recurrent bias goes with the other one.
    void pack(const Forward& f) {
        for (Index u = 0; u < blocks; ++u)
            for (Index g = 0; g < G; ++g) {
                const int lanes = lanes_of(u, f.D);
                const vec b_x = f.b_x ? load(f.b_x + g * f.H + u * V, lanes) : vec{};
                const vec b_h = f.b_h ? load(f.b_h + g * f.H + u * V, lanes) : vec{};
                const bool separate = f.cell->SEPARATE >> g & 1;
                store(x + (u * G + g) * V, separate ? b_x : b_x + b_h);
                store(h + (u * G + g) * V, separate ? b_h : vec{});
            }
        memset(projection, 0, outputs * V * sizeof(scalar));
    }
};

struct Matrices {
    Matrix W, R, W_hr;
    explicit Matrices(const Forward& f)
        : W{f.D, f.I, f.cell->G, f.W, f.H * f.I, f.I, 1}, R{f.D, f.Q, f.cell->G, f.R, f.H * f.Q, f.Q, 1},
          W_hr{f.P, f.H, 1, f.W_hr, 0, f.H, 1} {}

    // Of so many blocks of D and of Q; `place` puts their panels one after the other.
    Index size(Index blocks, Index outputs) const { return W.size(blocks) + R.size(blocks) + W_hr.size(outputs); }
    void place(scalar* at, Index blocks) {
        W.panels = at, R.panels = W.panels + W.size(blocks), W_hr.panels = R.panels + R.size(blocks);
    }
};

// Of what `pack` makes: starts, then matrices.
static Index packed_size(const Forward& f) {
    return Starts(f, nullptr).size() + Matrices(f).size(blocks_of(f.D), blocks_of(f.Q));
}

static Forward head(const Forward& all, Index n) {
    Forward f = all;
    const Index unit = n * f.D, output = n * f.Q;
    if (!f.W) skip(f.x, unit);
    skip(f.W, unit * f.I), skip(f.R, unit * f.Q), skip(f.b_x, unit), skip(f.b_h, unit);
    skip(f.aux.units, unit), skip(f.aux.seed, n), skip(f.packed, n * packed_size(f));
    skip(f.y, output), skip(f.saved, n * f.T * f.B * blocks_of(f.D) * f.cell->K * V);
    for (Index s = 0; s < f.cell->S; ++s) skip(f.first[s], unit), skip(f.last[s], unit), skip(f.cell_states[s], unit);
    return f;
}

// How many elements the packed weights and biases have; where `to` is, they go there. For calls that have the same weights.
extern "C" Index pack(const Forward& f, scalar* to) {
    const Index blocks = blocks_of(f.D), outputs = blocks_of(f.Q), size = packed_size(f);
    for (Index n = 0; to && n < f.heads; ++n) {
        const Forward of_head = head(f, n);
        Starts starts(of_head, to + n * size);
        Matrices weights(of_head);
        weights.place(to + n * size + starts.size(), blocks);
        starts.pack(of_head), weights.W.pack(0, blocks), weights.R.pack(0, blocks), weights.W_hr.pack(0, outputs);
    }
    return f.heads * size;
}

static int forward_of_head(const Forward& f) {
    const Code& cell = *f.cell;
    const Index T = f.T, B = f.B, H = f.H, P = f.P, G = cell.G, GV = G * V;
    const Index blocks = blocks_of(f.D), outputs = blocks_of(f.Q);
    Workers workers(f.threads, f.openmp);
    const int threads = workers.count;
    const bool by_rows = B >= 2 * threads || cell.REDUCES;
    const int sharing = by_rows ? 1 : threads;

    Matrices weights(f);
    const bool few = T == 1 && B > 0 && B <= FEW_ROWS && !f.packed;  // weights are read where they are
    const bool once = T == 1 && sharing == threads && !f.packed && !few;
    Scratch h_in_scratch(cell.RECURRENT_INPUT ? B * P : 0), unprojected(f.W_hr && !f.h_unprojected ? B * H : 0);
    const Index rows = by_rows ? (B + threads - 1) / threads : B, width = (blocks + sharing - 1) / sharing;
    // Inputs of several time steps are projected at once where one has too few rows; else those of a step's next blocks.
    const Index passes = f.passes, inputs_T = T / passes;
    const Index chunk = !f.W ? 0 : rows < CHUNK_ROWS ? min(inputs_T, CHUNK_ROWS / max(rows, 1)) : passes - 1;
    const Index inputs = !f.W ? 0 : chunk || cell.REDUCES ? max(chunk, 1) * rows * width * GV : scratch_elements(G, rows);
    Index gates = cell.REDUCES ? rows * blocks * GV : 0;  // of the recurrent projection, of either pass
    for (const auto& range : f.gates) gates = max(gates, scratch_elements(range[0], range[1], G, rows));
    const Index projected = scratch_elements(1, rows);
    const Index some_blocks = Cut(G, rows).blocks, some_outputs = Cut(1, rows).blocks;  // that stand side by side
    const Index own = inputs + gates + projected + (once ? weights.size(some_blocks, some_outputs) : 0);
    const Index start_size = Starts(f, nullptr).size(), panels = few || once ? 0 : weights.size(blocks, outputs);
    Scratch scratch(threads * own), packed(f.packed ? 0 : start_size + panels);
    if (h_in_scratch.failed || unprojected.failed || scratch.failed || packed.failed) return 1;
    Starts starts(f, f.packed ? const_cast<scalar*>(f.packed) : packed.data);
    if (!few) weights.place(starts.x + start_size, blocks);
    if (!f.packed) starts.pack(f);

    const auto time_of = [&](Index n) { return f.reverse ? T - 1 - n : n; };
    const auto h_before = [&](Index n) { return n == 0 ? f.first[0] : f.y + time_of(n - 1) * B * P; };
    Barrier ready{threads}, barrier{sharing};
    auto body = [&](int thread) {
        const Part all_of{0, 0, thread, threads}, part = part_of(thread, threads, B, by_rows);
        Matrix W = weights.W, R = weights.R, W_hr = weights.W_hr;
        if (!few && !once && !f.packed) {
            W.pack(all_of.first(blocks), all_of.last(blocks));
            R.pack(all_of.first(blocks), all_of.last(blocks));
            W_hr.pack(all_of.first(outputs), all_of.last(outputs));
            ready.wait();
        }
        if (part.b0 == part.b1) return;  // more threads than rows of a cell that REDUCES

        const Index b0 = part.b0, b1 = part.b1, mine = b1 - b0, u0 = part.first(blocks), u1 = part.last(blocks), some = u1 - u0;
        const Index p0 = part.first(outputs), p1 = part.last(outputs);
        scalar* Wx = scratch.data + thread * own;  // of a chunk: [chunk][mine][some][G][V]; else as Rh
        scalar* Rh = Wx + inputs;                  // [mine][blocks][G][V], or a few blocks for the time being
        scalar* h = Rh + gates;                    // a few blocks for the time being
        if (once) {
            W.panels = h + projected, R.panels = W.panels + W.size(some_blocks);
            W_hr.panels = R.panels + R.size(some_blocks);
        }

        const auto product = [&](Matrix& w, const Cut& cut, Index u, Index end, auto row, const scalar* start, scalar* out,
                                 Index out_row) {
            if (few) return multiply_in_place(w, cut, u, end, row, start, out, out_row);
            if (once) w.repack(u, end);
            multiply(w, cut, u, end, row, start, out, out_row);
        };
        // Blocks [u, end) of the input projection of `steps` inputs from number n on.
        const auto x_at = [&](Index n) { return f.x + (f.reverse ? inputs_T - 1 - n : n) * f.x_time + b0 * f.x_row; };
        const auto project = [&](Index n, Index steps, Index u, Index end, scalar* out, Index out_row) {
            const auto input = [&](Index r) { return x_at(n + r / mine) + r % mine * f.x_row; };
            product(W, Cut(G, steps * mine), u, end, input, starts.x, out, out_row);
        };
        if (passes > 1) memset(Rh, 0, gates * sizeof(scalar));  // a pass sees numbers, whichever gates it doesn't read
        const Cut of_pass[2] = {{f.gates[0][0], f.gates[0][1], mine}, {f.gates[1][0], f.gates[1][1], mine}}, output(1, mine);
        for (Index n = 0; n < T; ++n) {
            const Cut& recurrent = of_pass[n & 1];
            const Index at = chunk ? n / passes % chunk : 0;
            if (chunk && n % (chunk * passes) == 0) {
                const Index steps = min(chunk, (T - n) / passes);
                each_blocks(Cut(G, steps * mine), u0, u1, [&](Index u, Index end) {
                    project(n / passes, steps, u, end, Wx + (u - u0) * GV, some * GV);
                });
            }
            const Index t = time_of(n);
            const scalar* before = h_before(n);
            const scalar* h_in = before;
            if (cell.RECURRENT_INPUT) {
                cell.recurrent_input(f, n, {b0, b1, p0, p1}, before, h_in_scratch.data);
                h_in = h_in_scratch.data;
                barrier.wait();
            }
            scalar* to = !f.W_hr ? f.y + t * B * P : f.h_unprojected ? f.h_unprojected + t * B * H : unprojected.data;
            const scalar* x = Wx + at * mine * some * GV;
            each_blocks(recurrent, u0, u1, [&](Index u, Index end) {
                const Index across = cell.REDUCES ? blocks : recurrent.blocks;
                const auto row = [&](Index r) { return h_in + (b0 + r) * P; };
                product(R, recurrent, u, end, row, starts.h, cell.REDUCES ? Rh + u * GV : Rh, across * GV);
                Gates input{x + (u - u0) * GV, some * GV};
                if (!f.W) {
                    input = {x_at(n / passes), f.x_row, starts.x};
                } else if (!chunk) {
                    input = cell.REDUCES ? Gates{x + u * GV, blocks * GV} : Gates{x, across * GV};
                    project(n, 1, u, end, const_cast<scalar*>(input.data), input.row);
                }
                if (cell.REDUCES) {
                    if (f.W) input = {x, blocks * GV};
                    if (end == blocks) cell.step(f, n, {b0, b1, 0, blocks}, input, {Rh, blocks * GV}, to);
                } else {
                    cell.step(f, n, {b0, b1, u, end}, input, {Rh, across * GV}, to);
                }
            });
            barrier.wait();
            if (!f.W_hr) continue;
            each_blocks(output, p0, p1, [&](Index u, Index end) {
                const Index out_row = output.blocks * V;
                const auto row = [&](Index r) { return to + (b0 + r) * H; };
                product(W_hr, output, u, end, row, starts.projection, h, out_row);
                for (Index b = b0; b < b1; ++b) {
                    // Where states are held, a projected h stays what it was before.
                    const bool held = cell.HOLD >= 0 && (f.aux.flags[t * B + b] >> cell.HOLD & 1);
                    for (Index p = u; p < end; ++p) {
                        const int lanes = lanes_of(p, f.Q);
                        const vec made = load(h + (b - b0) * out_row + (p - u) * V);
                        store(f.y + (t * B + b) * P + p * V, held ? load(before + b * P + p * V, lanes) : made, lanes);
                    }
                }
            });
            barrier.wait();
        }
    };
    return workers.run(body) ? 0 : 1;
}

// `count` runs of the same sizes; more than one thread: each does all of a head at a time. 0, or 1 where there is no memory
// or thread.
extern "C" int forward(const Forward* runs, Index count, Index threads) {
    const Code& cell = *runs->cell;
    const Index T = runs->T, of_h = runs->B * runs->P, of_state = runs->B * runs->H;
    for (const Forward* f = runs; f < runs + count; ++f)
        for (Index s = 1; s < cell.S; ++s) {
            scalar* states = f->cell_states[s];
            memmove(states ? states + T * of_state : f->last[s], f->first[s], of_state * sizeof(scalar));
        }
    if (each_head(runs, count, threads, forward_of_head)) return 1;
    for (const Forward* f = runs; f < runs + count; ++f) {
        memcpy(f->last[0], f->y + (f->reverse ? 0 : T - 1) * of_h, of_h * sizeof(scalar));
        for (Index s = 1; s < cell.S && f->cell_states[s]; ++s)
            memcpy(f->last[s], f->cell_states[s] + (f->reverse ? 0 : T - 1) * of_state, of_state * sizeof(scalar));
    }
    return 0;
}

// A run by itself, for a caller to whom arguments have a price.
extern "C" int step(const Forward& f) { return forward(&f, 1, 1); }

// ---- Gradients of inputs and weights -------------------------------------------------------------------------------

// Rows [T B][columns] of an array, `row` apart within a time step and time steps `time` apart; or with h0 those of `shift`
// time steps away, and h0 at time step `first`, where there are none.
struct Rows {
    const scalar* data;
    Index columns, B, time, row;
    const scalar* h0 = nullptr;
    Index first = -1, shift = 0;
    const scalar* operator()(Index k) const {
        const Index t = k / B, b = k % B;
        return t == first ? h0 + b * row : data + (t + shift) * time + b * row;
    }
    Rows of_head(Index n, Index size) const {
        return {data + n * size, size, B, time, row, h0 ? h0 + n * size : h0, first, shift};
    }
};

// out [M, N], rows [m0, m1) = a^T b, for a [K, M] and b [K, N]. A piece of K at a time is
// transposed, as rows, and packed, as weights; `room` is for both, and for the sums where N is no multiple of V.
static void transposed_product(const scalar* a, Index K, Index M, Index m0, Index m1, const Rows& b, scalar* out,
                               const scalar* zero, scalar* room) {
    const Index N = b.columns, blocks = blocks_of(N), width = blocks * V;
    const bool ragged = width != N;
    scalar *columns = room, *panels = columns + CHUNK_ROWS * PIECE;
    scalar* sums = ragged ? panels + blocks * PIECE * V : out + m0 * N;  // of rows from m0 on
    for (Index k0 = 0; k0 == 0 || k0 < K; k0 += PIECE) {
        const Index piece = min(PIECE, K - k0);
        const Matrix w{N, piece, 1, nullptr, 0, 0, 0, panels};
        for (Index u = 0; u < blocks; ++u)
            for (Index k = 0; k < piece; ++k) store(w.panel(u) + k * V, load(b(k0 + k) + u * V, lanes_of(u, N)));
        for (Index m = m0; m < m1; m += CHUNK_ROWS) {
            const Index some = min(CHUNK_ROWS, m1 - m), whole = some / V * V, even = piece / V * V;
            const scalar* from = a + k0 * M + m;
            for (Index k = 0; k < even; k += V)
                for (Index i = 0; i < whole; i += V) transpose(from + k * M + i, M, columns + i * PIECE + k, PIECE);
            for (Index k = 0; k < piece; ++k)
                for (Index i = k < even ? whole : 0; i < some; ++i) columns[i * PIECE + k] = from[k * M + i];
            const Cut cut(1, some);
            each_blocks(cut, 0, blocks, [&](Index u, Index end) {
                multiply(w, cut, u, end, [&](Index r) { return columns + r * PIECE; }, k0 == 0 ? zero : nullptr,
                         sums + (m - m0) * width + u * V, width);
            });
        }
    }
    for (Index m = m0; ragged && m < m1; ++m)
        for (Index u = 0; u < blocks; ++u) store(out + m * N + u * V, load(sums + (m - m0) * width + u * V), lanes_of(u, N));
}

// out [columns] from `first` to `last` = the sum of a [rows, columns] over rows, as exact as `scalar`: a plain sum would
// lose digits.
static void sum_rows(const scalar* a, Index rows, Index columns, Index first, Index last, scalar* out) {
    constexpr Index RUN = 32;  // rows that are added up in `scalar`
    double total[64];
    for (; first < last; first += 64) {
        const Index some = min(64, last - first);
        for (Index c = 0; c < some; ++c) total[c] = 0;
        for (Index begin = 0; begin < rows; begin += RUN) {
            scalar sum[64] = {};
            for (Index r = begin; r < min(begin + RUN, rows); ++r)
                for (Index c = 0; c < some; ++c) sum[c] += a[r * columns + first + c];
            for (Index c = 0; c < some; ++c) total[c] += sum[c];
        }
        for (Index c = 0; c < some; ++c) out[first + c] = static_cast<scalar>(total[c]);
    }
}

// Those that are requested, from dWx, dRh and dy_total of all time steps. 0, or 1 where there is no memory or thread.
static int gradients(const Backward& f) {
    const Code& cell = *f.cell;
    const Index T = f.T, B = f.B, I = f.I, H = f.H, P = f.P, D = f.D, Q = f.Q, M = cell.G * H, K = T * B, Kx = K / f.passes;
    Workers workers(f.threads_after, f.openmp);
    const int threads = workers.count;
    Matrix W_back{I, M, 1, f.dx ? f.W : nullptr, 0, 1, I};
    const Index inputs = blocks_of(I), blocks = blocks_of(max(I, max(H, P)));
    const Index sums = I % V || H % V || Q % V ? (blocks_of(M) + threads - 1) / threads * V * blocks * V : 0;
    const Index own = CHUNK_ROWS * PIECE + blocks * PIECE * V + sums;
    const bool recompute_h_in = f.dR && cell.RECURRENT_INPUT && K > 0;
    Scratch zero(blocks * V), scratch(threads * own), packed(W_back.size(inputs));
    Scratch h_in_scratch(recompute_h_in ? K * P : 0);
    if (zero.failed || scratch.failed || packed.failed || h_in_scratch.failed) return 1;
    memset(zero.data, 0, blocks * V * sizeof(scalar));
    W_back.panels = packed.data;
    const Rows x{f.x, I, B, f.x_time, f.x_row}, unprojected{f.h_unprojected, H, B, B * H, H};
    const Rows h_before{f.y, P, B, B * P, P, f.h0, f.reverse ? T - 1 : 0, f.reverse ? 1 : -1};
    const Rows h_in_rows = recompute_h_in ? Rows{h_in_scratch.data, P, B, B * P, P} : h_before;
    Barrier ready{threads};
    auto body = [&](int thread) {
        const Part part{0, 0, thread, threads};
        scalar* room = scratch.data + thread * own;
        W_back.pack(part.first(inputs), part.last(inputs));
        for (Index n = 0; recompute_h_in && n < f.heads; ++n) {
            Forward like{};
            like.T = T, like.B = B, like.H = H, like.P = P, like.D = D, like.Q = Q, like.reverse = f.reverse;
            like.aux = f.aux, like.unit_rows = f.unit_rows;
            skip(like.aux.units, n * D), skip(like.aux.seed, n);
            for (Index t = part.first(T); t < part.last(T); ++t)
                cell.recurrent_input(like, f.reverse ? T - 1 - t : t, {0, B, 0, blocks_of(Q)}, h_before(t * B) + n * Q,
                                     h_in_scratch.data + t * B * P + n * Q);
        }
        const bool two = f.passes == 2 && f.dWx_sum;
        for (Index t = part.first(T / f.passes); two && t < part.last(T / f.passes); ++t) {
            const scalar* both = f.dWx + 2 * t * B * M;
            for (Index k = 0; k < B * M; ++k) f.dWx_sum[t * B * M + k] = both[k] + both[B * M + k];
        }
        ready.wait();

        for (Index r0 = part.first(Kx), end = part.last(Kx); f.dx && r0 < end; r0 += CHUNK_ROWS) {
            const Index some = min(CHUNK_ROWS, end - r0);
            const Cut cut(1, some);
            each_blocks(cut, 0, inputs, [&](Index u, Index u1) {
                const Index across = cut.blocks * V;
                multiply(W_back, cut, u, u1, [&](Index r) { return f.dWx_sum + (r0 + r) * M; }, zero.data, room, across);
                for (Index r = 0; r < some; ++r)
                    for (Index v = u; v < u1; ++v)
                        store(f.dx + (r0 + r) * I + v * V, load(room + r * across + (v - u) * V), lanes_of(v, I));
            });
        }
        const Index m0 = part.first(blocks_of(M)) * V, m1 = min(M, part.last(blocks_of(M)) * V);
        const Index p0 = part.first(blocks_of(P)) * V, p1 = min(P, part.last(blocks_of(P)) * V);
        if (f.dW) transposed_product(f.dWx_sum, Kx, M, m0, m1, x, f.dW, zero.data, room);
        for (Index m = m0, end; f.dR && m < m1; m = end) {  // from head to head
            end = f.heads == 1 ? m1 : min(m1, (m / D + 1) * D);
            transposed_product(f.dRh, K, M, m, end, h_in_rows.of_head(m % H / D, Q), f.dR, zero.data, room);
        }
        if (f.dW_hr) transposed_product(f.dy_total, K, P, p0, p1, unprojected, f.dW_hr, zero.data, room);
        if (f.db_x) sum_rows(f.dWx_sum, Kx, M, m0, m1, f.db_x);
        if (f.db_h) sum_rows(f.dRh, K, M, m0, m1, f.db_h);
    };
    if (!workers.run(body)) return 1;
    for (Index n = 0; f.dunits_sum && n < cell.TRAINABLE; ++n)
        sum_rows(f.dunits + n * B * H, B, H, 0, H, f.dunits_sum + n * H);
    return 0;
}

// ---- Backward ------------------------------------------------------------------------------------------------------

static Backward head(const Backward& all, Index n) {
    Backward f = all;
    const Index unit = n * f.D, output = n * f.Q;
    skip(f.R, unit * f.Q), skip(f.aux.units, unit), skip(f.aux.seed, n), skip(f.y, output), skip(f.h0, output);
    skip(f.saved, n * f.T * f.B * blocks_of(f.D) * f.cell->K * V), skip(f.dy, output);
    skip(f.dWx, unit), skip(f.dRh, unit), skip(f.dunits, unit);
    for (Index s = 0; s < f.cell->S; ++s) skip(f.dfirst[s], unit), skip(f.dhistory[s], unit), skip(f.cell_states[s], unit);
    return f;
}

static int backward_of_head(const Backward& f) {
    const Code& cell = *f.cell;
    const Index T = f.T, B = f.B, H = f.H, P = f.P, G = cell.G;
    const Index blocks = blocks_of(f.D), outputs = blocks_of(f.Q);
    Workers workers(f.threads, f.openmp);
    const int threads = workers.count;
    const bool by_rows = B >= 2 * threads || cell.REDUCES;
    const int sharing = by_rows ? 1 : threads;

    Matrix R_back{f.Q, G * f.D, 1, f.R, 0, 1, f.Q}, W_hr_back{H, P, 1, f.W_hr, 0, 1, H};  // both the other way round
    R_back.span = f.D, R_back.apart = H;
    const Index rows = by_rows ? (B + threads - 1) / threads : B;
    const Index some_units = scratch_elements(1, rows), unprojected = cell.REDUCES ? rows * blocks * V : some_units;
    const Index own = unprojected + some_units;
    Scratch zero(max(blocks, outputs) * V), scratch(threads * own), packed(R_back.size(outputs) + W_hr_back.size(blocks));
    if (zero.failed || scratch.failed || packed.failed) return 1;
    R_back.panels = packed.data, W_hr_back.panels = packed.data + R_back.size(outputs);
    memset(zero.data, 0, max(blocks, outputs) * V * sizeof(scalar));

    Barrier ready{threads}, barrier{sharing};
    auto body = [&](int thread) {
        const Part all_of{0, 0, thread, threads}, part = part_of(thread, threads, B, by_rows);
        R_back.pack(all_of.first(outputs), all_of.last(outputs));
        W_hr_back.pack(all_of.first(blocks), all_of.last(blocks));
        ready.wait();

        const Index b0 = part.b0, b1 = part.b1, u0 = part.first(blocks), u1 = part.last(blocks);
        const Index p0 = part.first(outputs), p1 = part.last(outputs);
        scalar* dh = scratch.data + thread * own;  // of h before its projection: [mine][blocks][V], or for the time being
        scalar* back = dh + unprojected;           // through the recurrent weights, for the time being
        const Cut cut(1, b1 - b0);
        for (Index n = T - 1; n >= 0; --n) {
            const Index t = f.reverse ? T - 1 - n : n;
            if (!f.W_hr) {
                cell.grad(f, n, {b0, b1, u0, u1}, {nullptr, 0});
            } else {
                scalar* total = f.dy_total + t * B * P;
                for (Index b = b0; b < b1; ++b) {  // a held h hands its gradient on to the one before
                    const bool held = cell.HOLD >= 0 && (f.aux.flags[t * B + b] >> cell.HOLD & 1);
                    for (Index p = p0; p < p1; ++p) {
                        const int lanes = lanes_of(p, f.Q);
                        const Index at = b * P + p * V;
                        const vec sum = load(f.dy + t * B * P + at, lanes) + load(f.dfirst[0] + at, lanes);
                        store(total + at, held ? vec{} : sum, lanes);
                        store(f.dfirst[0] + at, held ? sum : vec{}, lanes);
                    }
                }
                barrier.wait();
                each_blocks(cut, u0, u1, [&](Index u, Index end) {
                    const Index across = cell.REDUCES ? blocks : cut.blocks;
                    const auto row = [&](Index r) { return total + (b0 + r) * P; };
                    multiply(W_hr_back, cut, u, end, row, zero.data, cell.REDUCES ? dh + u * V : dh, across * V);
                    if (!cell.REDUCES) cell.grad(f, n, {b0, b1, u, end}, {dh, across * V});
                    else if (end == blocks) cell.grad(f, n, {b0, b1, 0, blocks}, {dh, blocks * V});
                });
            }
            barrier.wait();
            each_blocks(cut, p0, p1, [&](Index u, Index end) {
                const auto row = [&](Index r) { return f.dRh + (t * B + b0 + r) * G * H; };
                const Index(&gates)[2] = f.gates[n & 1];
                multiply(R_back, cut, u, end, row, zero.data, back, cut.blocks * V, gates[0] * f.D, gates[1] * f.D);
                cell.recurrent_input_grad(f, n, {b0, b1, u, end}, {back, cut.blocks * V});
            });
            barrier.wait();
        }
    };
    return workers.run(body) ? 0 : 1;
}

// As `forward`.
extern "C" int backward(const Backward* runs, Index count, Index threads) {
    for (const Backward* f = runs; f < runs + count; ++f)
        for (Index s = 0; s < f->cell->S; ++s)
            memcpy(f->dfirst[s], f->dlast[s], f->B * (s ? f->H : f->P) * sizeof(scalar));
    int failed = each_head(runs, count, threads, backward_of_head);
    for (const Backward* f = runs; f < runs + count && !failed; ++f) failed = gradients(*f);
    return failed;
}
