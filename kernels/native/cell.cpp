// cell.cpp: the elementwise part of a time step, forward and backward, for any cell: `Cell` is generated from its
// definition. Compiled once a cell; the products and the time loop (sequence.cpp) know no cell and are compiled once.
//
// A call does some blocks of units of some batch rows. Gates come in vectors straight from the product, everything else
// lies as the caller has it. Where the cell takes means over units (Cell::*_LEVELS), a call has whole rows and goes
// through each once for every level of means and once more for the result, in one order of additions.

constexpr int G = Cell::G, S = Cell::S, K = Cell::K, TRAINABLE = Cell::TRAINABLE;
constexpr int PER_UNIT = Cell::PER_UNIT, FLAGS = Cell::FLAGS, UNIFORMS = Cell::UNIFORMS;
constexpr int AUX = PER_UNIT + FLAGS + UNIFORMS;
DEVICE constexpr int or_1(int size) { return size > 0 ? size : 1; }  // an array has an element

static_assert(S <= MAX_STATES, "more states than MAX_STATES");

// ---- Auxiliary values ----------------------------------------------------------------------------------------------

// Four random numbers of 32 bits from four counters: Philox4x32-10 (Salmon et al. 2011), as in kernels/philox.py. Each is the
// lower half of a word; the upper ones are anything.
static void philox(words (&counter)[4], uint64_t seed) {
    const words zero = {}, first = zero + 0xD2511F53u, second = zero + 0xCD9E8D57u;
    uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const words a = product(counter[0], first), b = product(counter[2], second);
        counter[0] = (b >> 32) ^ counter[1] ^ low, counter[2] = (a >> 32) ^ counter[3] ^ high;
        counter[1] = b, counter[3] = a;
        low += 0x9E3779B9u, high += 0xBB67AE85u;
    }
}

// All of them for block u of row b at time t, in vector i; `width` is how many units the values per unit are for.
template <class Problem>
DEVICE void load_aux(real (&aux)[or_1(AUX)], int i, const Problem& problem, Index t, Index b, Index u, Index width) {
    const Auxiliary& from = problem.aux;
    const Index rows = problem.unit_rows;
    const int lanes = lanes_of(u, width);
    for (int n = 0; n < PER_UNIT; ++n)
        aux[n].v[i] = load(from.units + (n * rows + (rows > 1 ? b : 0)) * problem.H + u * V, lanes);
    for (int n = 0; n < FLAGS; ++n)
        aux[PER_UNIT + n].v[i] = all(static_cast<scalar>(from.flags[t * problem.B + b] >> n & 1));
    for (int n = 0; n < UNIFORMS; n += 4) {
        uint64_t numbers[4][V];
        for (int k = 0; k < V; k += WORDS) {
            words counter[4];
            for (int i = 0; i < WORDS; ++i) {
                counter[0][i] = u * V + k + i, counter[1][i] = b;
                counter[2][i] = t, counter[3][i] = n / 4;
            }
            philox(counter, *from.seed);
            for (int j = 0; j < 4; ++j) __builtin_memcpy(numbers[j] + k, &counter[j], sizeof(words));
        }
        for (int j = 0; j < 4 && n + j < UNIFORMS; ++j) {
            vec uniform;
            for (int k = 0; k < V; ++k) uniform[k] = static_cast<scalar>(static_cast<int32_t>(numbers[j][k] >> 8 & 0xFFFFFF));
            aux[PER_UNIT + FLAGS + n + j].v[i] = uniform * all(scalar(1.0 / 16777216));
        }
    }
}

// ---- Going through a range -----------------------------------------------------------------------------------------

// The blocks of a range, row after row, PAIR at a time: body(count, b, u). Where their number is odd, the last pair is filled
// with a copy of its block; only `count` results are stored.
template <class Body>
DEVICE void each_pair(Range range, Body body) {
    const Index across = range.u1 - range.u0, total = (range.b1 - range.b0) * across;
    Index row = range.b0, unit = range.u0;
    for (Index begin = 0; begin < total; begin += PAIR) {
        const int count = total - begin < PAIR ? static_cast<int>(total - begin) : PAIR;
        Index b[PAIR], u[PAIR];
        for (int i = 0; i < PAIR; ++i) {
            b[i] = row, u[i] = unit;
            if (begin + i + 1 < total && ++unit == range.u1) unit = range.u0, ++row;
        }
        body(count, b, u);
    }
}

// Means over the units of a head in row b. values_of(level, b, u, values) gives what is averaged of PAIR blocks; lanes past
// the last unit don't count.
template <int LEVELS, int MEANS, class Values>
DEVICE void reduce_over_units(real (&means)[MEANS], Index row, Index units, int (*before)(int), Values values_of) {
    for (int level = 0; level < LEVELS; ++level) {
        const int first = before(level), last = before(level + 1);
        vec sums[MEANS];
        for (int n = first; n < last; ++n) sums[n] = vec{};
        each_pair({row, row + 1, 0, blocks_of(units)}, [&](int count, const Index* b, const Index* u) {
            real values[MEANS];
            values_of(level, b, u, values);
            for (int i = 0; i < count; ++i) {
                const int lanes = lanes_of(u[i], units);
                for (int n = first; n < last; ++n) {
                    vec value = values[n - first].v[i];
                    for (int k = lanes; k < V; ++k) value[k] = 0;
                    sums[n] += value;
                }
            }
        });
        for (int n = first; n < last; ++n) {
            scalar sum = 0;
            for (int k = 0; k < V; ++k) sum += sums[n][k];
            means[n] = static_cast<double>(sum / static_cast<scalar>(units));
        }
    }
}

// ---- Forward -------------------------------------------------------------------------------------------------------

template <class Problem>
DEVICE Index time_of(const Problem& problem, Index n) { return problem.reverse ? problem.T - 1 - n : n; }

// Where in [T+1] the states with index n lie: those after a time step at its place, and the first ones at the end.
template <class Problem>
DEVICE Index place_of(const Problem& problem, Index n) { return n == 0 ? problem.T : time_of(problem, n - 1); }

// h: [B, H] where h of a head after the step goes: y, or what the projection takes.
static void step(const Forward& f, Index n, Range range, Gates Wx, Gates Rh, scalar* h) {
    const Index t = time_of(f, n), H = f.H, plane = f.B * H;
    const scalar* before[S];
    scalar* after[S];
    before[0] = n == 0 ? f.first[0] : f.y + time_of(f, n - 1) * f.B * f.P;
    for (int s = 1; s < S; ++s) {
        before[s] = f.cell_states[s] ? f.cell_states[s] + place_of(f, n) * plane : f.last[s];
        after[s] = f.cell_states[s] ? f.cell_states[s] + place_of(f, n + 1) * plane : f.last[s];
    }
    struct StepInputs {
        real x[G], h[G], state[S], aux[or_1(AUX)];
    };
    const bool projected = f.W_hr != nullptr;
    const Index blocks = blocks_of(f.D), saved_row = n * f.B * blocks * K * V;
    auto load_inputs = [&](StepInputs& in, const Index* b, const Index* u) {
#pragma GCC unroll 4
        for (int i = 0; i < PAIR; ++i) {
            const int lanes = lanes_of(u[i], f.D);
            const Index at = b[i] * H + u[i] * V, row = b[i] - range.b0, block = (u[i] - range.u0) * G * V;
            const scalar *x = Wx.data + row * Wx.row, *h = Rh.data + row * Rh.row + block;
            for (int g = 0; g < G; ++g) {
                in.h[g].v[i] = load(h + g * V);
                if (!Wx.start) in.x[g].v[i] = load(x + block + g * V);
                else in.x[g].v[i] = load(x + g * H + u[i] * V, lanes) + load(Wx.start + (u[i] * G + g) * V);
            }
            in.state[0].v[i] = projected ? vec{} : load(before[0] + at, lanes);  // it can't see a projected h
            for (int s = 1; s < S; ++s) in.state[s].v[i] = load(before[s] + at, lanes);
            load_aux(in.aux, i, f, t, b[i], u[i], f.D);
        }
    };
    auto pass = [&](Range some, const real* means) {
        each_pair(some, [&](int count, const Index* b, const Index* u) {
            StepInputs in;
            real saved[or_1(K)];
            load_inputs(in, b, u);
            Cell::step(in.x, in.h, in.state, saved, in.aux, means);
#pragma GCC unroll 4
            for (int i = 0; i < PAIR; ++i) {
                if (i >= count) break;
                const int lanes = lanes_of(u[i], f.D);
                const Index at = b[i] * H + u[i] * V;
                store(h + at, in.state[0].v[i], lanes);
                for (int s = 1; s < S; ++s) store(after[s] + at, in.state[s].v[i], lanes);
                if (!f.saved) continue;
                scalar* to = f.saved + saved_row + (b[i] * blocks + u[i]) * K * V;
                for (int k = 0; k < K; ++k) store(to + k * V, saved[k].v[i]);
            }
        });
    };
    if constexpr (Cell::STEP_LEVELS == 0) return pass(range, nullptr);
    for (Index row = range.b0; row < range.b1; ++row) {
        real means[or_1(Cell::STEP_MEANS)];
        reduce_over_units<Cell::STEP_LEVELS>(means, row, f.D, Cell::step_before,
                                             [&](int level, const Index* b, const Index* u, real* values) {
            StepInputs in;
            load_inputs(in, b, u);
            Cell::step_level(level, in.x, in.h, in.state, in.aux, means, values);
        });
        pass({row, row + 1, range.u0, range.u1}, means);
    }
}

// The input of the recurrent matmul of time step n, from h [B, P].
static void recurrent_input(const Forward& f, Index n, Range range, const scalar* h, scalar* out) {
    each_pair(range, [&](int count, const Index* b, const Index* u) {
        real h_in[1], aux[or_1(AUX)];
        for (int i = 0; i < PAIR; ++i) {
            h_in[0].v[i] = load(h + b[i] * f.P + u[i] * V, lanes_of(u[i], f.Q));
            load_aux(aux, i, f, time_of(f, n), b[i], u[i], f.Q);
        }
        Cell::recurrent_input(h_in, aux);
        for (int i = 0; i < count; ++i) store(out + b[i] * f.P + u[i] * V, h_in[0].v[i], lanes_of(u[i], f.Q));
    });
}

// ---- Backward ------------------------------------------------------------------------------------------------------

DEVICE void add_to(scalar* sum, vec a, int lanes) { store(sum, load(sum, lanes) + a, lanes); }

// dh: gradient of h before its projection; without one it is dy plus what is in dfirst[0].
static void grad(const Backward& f, Index n, Range range, Gates dh) {
    const Index t = time_of(f, n), H = f.H, plane = f.B * H;
    const bool projected = f.W_hr != nullptr;
    const scalar* h_before = n == 0 ? f.h0 : f.y + time_of(f, n - 1) * f.B * f.P;
    const scalar* h_after = (projected ? f.h_unprojected : f.y) + t * plane;
    struct GradInputs {
        real dnew[S], next[S], state[S], saved[or_1(K)], aux[or_1(AUX)];
    };
    auto load_inputs = [&](GradInputs& in, const Index* b, const Index* u) {
#pragma GCC unroll 4
        for (int i = 0; i < PAIR; ++i) {
            const int lanes = lanes_of(u[i], f.D);
            const Index at = b[i] * H + u[i] * V;
            if (projected) in.dnew[0].v[i] = load(dh.data + (b[i] - range.b0) * dh.row + (u[i] - range.u0) * V);
            else in.dnew[0].v[i] = load(f.dy + t * plane + at, lanes) + load(f.dfirst[0] + at, lanes);
            in.next[0].v[i] = load(h_after + at, lanes);
            in.state[0].v[i] = projected ? vec{} : load(h_before + at, lanes);
            for (int s = 1; s < S; ++s) {
                in.dnew[s].v[i] = load(f.dfirst[s] + at, lanes);
                if (f.dhistory[s]) in.dnew[s].v[i] += load(f.dhistory[s] + t * plane + at, lanes);
                in.next[s].v[i] = load(f.cell_states[s] + place_of(f, n + 1) * plane + at, lanes);
                in.state[s].v[i] = load(f.cell_states[s] + place_of(f, n) * plane + at, lanes);
            }
            const scalar* from = f.saved + ((n * f.B + b[i]) * blocks_of(f.D) + u[i]) * K * V;
            for (int k = 0; k < K; ++k) in.saved[k].v[i] = load(from + k * V);
            load_aux(in.aux, i, f, t, b[i], u[i], f.D);
        }
    };
    auto pass = [&](Range some, const real* means) {
        each_pair(some, [&](int count, const Index* b, const Index* u) {
            GradInputs in;
            real dx[G], dr[G], dstate[S], dunits[or_1(TRAINABLE)];
            load_inputs(in, b, u);
            Cell::grad(in.dnew, in.next, in.state, in.saved, dx, dr, dstate, dunits, in.aux, means);
#pragma GCC unroll 4
            for (int i = 0; i < PAIR; ++i) {
                if (i >= count) break;
                const int lanes = lanes_of(u[i], f.D);
                const Index at = b[i] * H + u[i] * V, gate = (t * f.B + b[i]) * G * H + u[i] * V;
                for (int k = 0; k < TRAINABLE; ++k) add_to(f.dunits + k * plane + at, dunits[k].v[i], lanes);
                if (!projected) store(f.dfirst[0] + at, dstate[0].v[i], lanes);
                for (int s = 1; s < S; ++s) store(f.dfirst[s] + at, dstate[s].v[i], lanes);
                for (int g = 0; g < G; ++g) store(f.dWx + gate + g * H, dx[g].v[i], lanes);
                if (f.dRh == f.dWx) continue;
                for (int g = 0; g < G; ++g) store(f.dRh + gate + g * H, dr[g].v[i], lanes);
            }
        });
    };
    if constexpr (Cell::GRAD_LEVELS == 0) return pass(range, nullptr);
    for (Index row = range.b0; row < range.b1; ++row) {
        real means[or_1(Cell::GRAD_MEANS)];
        reduce_over_units<Cell::GRAD_LEVELS>(means, row, f.D, Cell::grad_before,
                                             [&](int level, const Index* b, const Index* u, real* values) {
            GradInputs in;
            load_inputs(in, b, u);
            Cell::grad_level(level, in.dnew, in.next, in.state, in.saved, in.aux, means, values);
        });
        pass({row, row + 1, range.u0, range.u1}, means);
    }
}

// dh: gradient of the input of the recurrent matmul of time step n. Added to dfirst[0], that of h.
static void recurrent_input_grad(const Backward& f, Index n, Range range, Gates dh) {
    each_pair(range, [&](int count, const Index* b, const Index* u) {
        real dh_in[1], aux[or_1(AUX)], dunits[or_1(TRAINABLE)];
        for (int i = 0; i < PAIR; ++i) {
            dh_in[0].v[i] = load(dh.data + (b[i] - range.b0) * dh.row + (u[i] - range.u0) * V);
            if constexpr (Cell::RECURRENT_INPUT != 0) load_aux(aux, i, f, time_of(f, n), b[i], u[i], f.Q);
        }
        if constexpr (Cell::RECURRENT_INPUT != 0) Cell::recurrent_input_grad(dh_in, dunits, aux);
        for (int i = 0; i < count; ++i) {
            const int lanes = lanes_of(u[i], f.Q);
            add_to(f.dfirst[0] + b[i] * f.P + u[i] * V, dh_in[0].v[i], lanes);
            if constexpr (Cell::RECURRENT_INPUT != 0)
                for (int k = 0; k < TRAINABLE; ++k)
                    add_to(f.dunits + (k * f.B + b[i]) * f.H + u[i] * V, dunits[k].v[i], lanes);
        }
    });
}

#ifndef HOLD_FLAG
#define HOLD_FLAG -1  // the bit of the flag by which a time step leaves the states as they are
#endif
extern "C" const Code code = {
    G, S, K, Cell::RECURRENT_INPUT, Cell::STEP_LEVELS + Cell::GRAD_LEVELS > 0, HOLD_FLAG, TRAINABLE, Cell::SEPARATE,
    step, recurrent_input, grad, recurrent_input_grad,
};
