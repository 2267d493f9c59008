// cell.cpp: the elementwise part of a time step, forward and backward, for any cell: `Cell` is generated from its
// definition. Compiled once a cell; the products and the time loop (sequence.cpp) know no cell and are compiled once.
//
// A call does some blocks of units of one batch row. Gates come in vectors straight from the product, everything else
// lies as the caller has it. Where the cell takes means over units (Cell::*_LEVELS), a call has a whole row and goes
// through it once for each level of means and once more for the result, in one order of additions.

constexpr int G = Cell::G, S = Cell::S, K = Cell::K, LEARNED = Cell::LEARNED;
constexpr int PER_UNIT = Cell::PER_UNIT, FLAGS = Cell::FLAGS, UNIFORMS = Cell::UNIFORMS;
constexpr int AUX = PER_UNIT + FLAGS + UNIFORMS;
DEVICE constexpr int or_1(int size) { return size > 0 ? size : 1; }  // an array has an element

static_assert(S <= MAX_STATES, "more states than MAX_STATES");

// ---- Auxiliary values ----------------------------------------------------------------------------------------------

// Four random words for each lane: Philox4x32-10 (Salmon et al. 2011), as in kernels/random.py.
static void philox(uint32_t (&counter)[4][V], uint64_t seed) {
    uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        for (int i = 0; i < V; ++i) {
            const uint64_t a = uint64_t(0xD2511F53u) * counter[0][i], b = uint64_t(0xCD9E8D57u) * counter[2][i];
            counter[0][i] = static_cast<uint32_t>(b >> 32) ^ counter[1][i] ^ low;
            counter[2][i] = static_cast<uint32_t>(a >> 32) ^ counter[3][i] ^ high;
            counter[1][i] = static_cast<uint32_t>(b);
            counter[3][i] = static_cast<uint32_t>(a);
        }
        low += 0x9E3779B9u, high += 0xBB67AE85u;
    }
}

// All of them for block u of row b at time t; `width` is how many units the values per unit are for.
template <class Problem>
DEVICE void load_aux(const Problem& problem, Index t, Index b, Index u, Index width, real (&aux)[or_1(AUX)]) {
    const Auxiliary& from = problem.aux;
    const int lanes = lanes_of(u, width);
    for (int n = 0; n < PER_UNIT; ++n)
        aux[n] = load(from.units + (n * from.unit_rows + (from.unit_rows > 1 ? b : 0)) * problem.H + u * V, lanes);
    for (int n = 0; n < FLAGS; ++n) aux[PER_UNIT + n] = double(from.flags[t * problem.B + b] >> n & 1);
    for (int n = 0; n < UNIFORMS; n += 4) {
        uint32_t words[4][V];
        for (int i = 0; i < V; ++i) {
            words[0][i] = static_cast<uint32_t>(u * V + i), words[1][i] = static_cast<uint32_t>(b);
            words[2][i] = static_cast<uint32_t>(t), words[3][i] = static_cast<uint32_t>(n / 4);
        }
        philox(words, *from.seed);
        for (int k = 0; k < 4 && n + k < UNIFORMS; ++k) {
            vec uniform;
            for (int i = 0; i < V; ++i) uniform[i] = static_cast<scalar>(static_cast<int32_t>(words[k][i] >> 8));
            aux[PER_UNIT + FLAGS + n + k] = uniform * all(scalar(1.0 / 16777216));
        }
    }
}

// ---- Means over the units of a row ---------------------------------------------------------------------------------

// values_of(level, u, values) gives what is averaged; lanes past the last unit don't count.
template <int LEVELS, int MEANS, class Values>
DEVICE void reduce_over_units(real (&means)[MEANS], Index H, int (*before)(int), Values values_of) {
    for (int level = 0; level < LEVELS; ++level) {
        const int first = before(level), last = before(level + 1);
        vec sums[MEANS];
        for (int n = first; n < last; ++n) sums[n] = vec{};
        for (Index u = 0; u < blocks_of(H); ++u) {
            real values[MEANS];
            values_of(level, u, values);
            const int lanes = lanes_of(u, H);
            for (int n = first; n < last; ++n) {
                vec value = values[n - first].v;
                for (int i = lanes; i < V; ++i) value[i] = 0;
                sums[n] += value;
            }
        }
        for (int n = first; n < last; ++n) {
            scalar sum = 0;
            for (int i = 0; i < V; ++i) sum += sums[n][i];
            means[n] = all(sum / static_cast<scalar>(H));
        }
    }
}

// ---- Forward -------------------------------------------------------------------------------------------------------

template <class Problem>
DEVICE Index time_of(const Problem& problem, Index n) { return problem.reverse ? problem.T - 1 - n : n; }

// h: where h after the step goes, [H] of this row: y, or what the projection takes.
static void step(const Forward& f, Index n, Index b, Index u0, Index u1, const scalar* Wx, const scalar* Rh, scalar* h) {
    const Index t = time_of(f, n), H = f.H, plane = f.B * H;
    const scalar* before[S];
    scalar* after[S];
    if (n == 0) before[0] = f.first[0] + b * f.P;
    else before[0] = f.y + (time_of(f, n - 1) * f.B + b) * f.P;
    for (int s = 1; s < S; ++s) {
        before[s] = after[s] = f.last[s] + b * H;
        if (!f.save) continue;
        before[s] = f.cell_states + (n * (S - 1) + s - 1) * plane + b * H;
        after[s] = f.cell_states + ((n + 1) * (S - 1) + s - 1) * plane + b * H;
    }
    struct Given {
        real x[G], h[G], state[S], aux[or_1(AUX)];
    };
    auto take = [&](Given& its, Index u) {
        const int lanes = lanes_of(u, H);
        for (int g = 0; g < G; ++g) {
            its.x[g] = load(Wx + ((u - u0) * G + g) * V);
            its.h[g] = load(Rh + ((u - u0) * G + g) * V);
        }
        // A cell whose h is projected can't see its own.
        its.state[0] = f.W_hr ? real(0.0) : real(load(before[0] + u * V, lanes));
        for (int s = 1; s < S; ++s) its.state[s] = load(before[s] + u * V, lanes);
        load_aux(f, t, b, u, H, its.aux);
    };
    real means[or_1(Cell::STEP_MEANS)];
    if constexpr (Cell::STEP_LEVELS > 0) {
        reduce_over_units<Cell::STEP_LEVELS>(means, H, Cell::step_before, [&](int level, Index u, real* values) {
            Given its;
            take(its, u);
            Cell::step_level(level, its.x, its.h, its.state, its.aux, means, values);
        });
    }
    for (Index u = u0; u < u1; ++u) {
        Given its;
        real saved[or_1(K)];
        take(its, u);
        Cell::step(its.x, its.h, its.state, saved, its.aux, means);
        const int lanes = lanes_of(u, H);
        store(h + u * V, its.state[0].v, lanes);
        for (int s = 1; s < S; ++s) store(after[s] + u * V, its.state[s].v, lanes);
        if (!f.save) continue;
        scalar* to = f.saved + ((n * f.B + b) * blocks_of(H) + u) * K * V;
        for (int k = 0; k < K; ++k) store(to + k * V, saved[k].v);
    }
}

// What the recurrent weights see of h [P], at time step n.
static void operand(const Forward& f, Index n, Index b, Index u0, Index u1, const scalar* h, scalar* out) {
    for (Index u = u0; u < u1; ++u) {
        const int lanes = lanes_of(u, f.P);
        real seen[1] = {load(h + u * V, lanes)}, aux[or_1(AUX)];
        load_aux(f, time_of(f, n), b, u, f.P, aux);
        Cell::operand(seen, aux);
        store(out + u * V, seen[0].v, lanes);
    }
}

// ---- Backward ------------------------------------------------------------------------------------------------------

// dh: [u1 - u0][V] gradient of h before its projection; null without one: then it is dy plus what is in dfirst[0].
static void grad(const Backward& f, Index n, Index b, Index u0, Index u1, const scalar* dh) {
    const Index t = time_of(f, n), H = f.H, plane = f.B * H, row = t * f.B + b;
    const bool projected = f.W_hr != nullptr;
    const scalar* h_before = n == 0 ? f.h0 + b * f.P : f.y + (time_of(f, n - 1) * f.B + b) * f.P;
    const scalar* h_after = (projected ? f.h_unprojected : f.y) + row * H;
    struct Given {
        real dnew[S], next[S], state[S], saved[or_1(K)], aux[or_1(AUX)];
    };
    auto take = [&](Given& its, Index u) {
        const int lanes = lanes_of(u, H);
        const Index at = b * H + u * V;
        if (projected) its.dnew[0] = load(dh + (u - u0) * V);
        else its.dnew[0] = load(f.dy + row * H + u * V, lanes) + load(f.dfirst[0] + at, lanes);
        its.next[0] = load(h_after + u * V, lanes);
        its.state[0] = projected ? real(0.0) : real(load(h_before + u * V, lanes));
        for (int s = 1; s < S; ++s) {
            its.dnew[s] = load(f.dfirst[s] + at, lanes);
            if (f.dhistory[s]) its.dnew[s] = its.dnew[s] + real(load(f.dhistory[s] + row * H + u * V, lanes));
            its.next[s] = load(f.cell_states + ((n + 1) * (S - 1) + s - 1) * plane + at, lanes);
            its.state[s] = load(f.cell_states + (n * (S - 1) + s - 1) * plane + at, lanes);
        }
        const scalar* from = f.saved + ((n * f.B + b) * blocks_of(H) + u) * K * V;
        for (int k = 0; k < K; ++k) its.saved[k] = load(from + k * V);
        load_aux(f, t, b, u, H, its.aux);
    };
    real means[or_1(Cell::GRAD_MEANS)];
    if constexpr (Cell::GRAD_LEVELS > 0) {
        reduce_over_units<Cell::GRAD_LEVELS>(means, H, Cell::grad_before, [&](int level, Index u, real* values) {
            Given its;
            take(its, u);
            Cell::grad_level(level, its.dnew, its.next, its.state, its.saved, its.aux, means, values);
        });
    }
    for (Index u = u0; u < u1; ++u) {
        Given its;
        real dx[G], dr[G], dstate[S], dunits[or_1(LEARNED)];
        take(its, u);
        Cell::grad(its.dnew, its.next, its.state, its.saved, dx, dr, dstate, dunits, its.aux, means);
        const int lanes = lanes_of(u, H);
        for (int k = 0; k < LEARNED; ++k) {
            scalar* sum = f.dunits + (k * f.B + b) * H + u * V;
            store(sum, load(sum, lanes) + dunits[k].v, lanes);
        }
        if (!projected) store(f.dfirst[0] + b * H + u * V, dstate[0].v, lanes);
        for (int s = 1; s < S; ++s) store(f.dfirst[s] + b * H + u * V, dstate[s].v, lanes);
        for (int g = 0; g < G; ++g) store(f.dWx + (row * G + g) * H + u * V, dx[g].v, lanes);
        if (f.dRh == f.dWx) continue;
        for (int g = 0; g < G; ++g) store(f.dRh + (row * G + g) * H + u * V, dr[g].v, lanes);
    }
}

// dh: [u1 - u0][V] gradient of what the recurrent weights saw at time step n. Added to dfirst[0], that of h.
static void operand_grad(const Backward& f, Index n, Index b, Index u0, Index u1, const scalar* dh) {
    for (Index u = u0; u < u1; ++u) {
        const int lanes = lanes_of(u, f.P);
        real found[1] = {load(dh + (u - u0) * V)};
        if constexpr (Cell::OPERAND != 0) {
            real aux[or_1(AUX)], dunits[or_1(LEARNED)];
            load_aux(f, time_of(f, n), b, u, f.P, aux);
            Cell::operand_grad(found, dunits, aux);
            for (int k = 0; k < LEARNED; ++k) {
                scalar* sum = f.dunits + (k * f.B + b) * f.H + u * V;
                store(sum, load(sum, lanes) + dunits[k].v, lanes);
            }
        }
        scalar* to = f.dfirst[0] + b * f.P + u * V;
        store(to, load(to, lanes) + found[0].v, lanes);
    }
}

#ifndef HOLD_FLAG
#define HOLD_FLAG -1  // the bit of the flag by which a time step leaves the states as they are
#endif
extern "C" const Code code = {
    G, S, K, Cell::OPERAND, Cell::STEP_LEVELS + Cell::GRAD_LEVELS > 0, HOLD_FLAG, LEARNED, Cell::SEPARATE,
    step, operand, grad, operand_grad,
};
