// sequence.h: what a sequence reads and writes, and the functions of a cell that its time loop calls.
//
// A time step n counts in the order of computation, t is its place in [T, ...]; with `reverse` t = T - 1 - n. Units come
// in blocks of V, the lanes of a vector; the last block of H or P may be ragged, and its further lanes are zero.
// State index n is before time step n, as in FlashRNN's states. All fields have 8 bytes, as Python packs them.
//
// Of several heads each is a recurrence by itself: D of the H units of every gate and state, Q of the P that the
// recurrent weights see. `head` gives the same struct for one, whose arrays begin with its own units; rows stay as far
// apart as those of the whole.

constexpr int MAX_STATES = 16;

DEVICE Index blocks_of(Index units) { return (units + V - 1) / V; }
DEVICE int lanes_of(Index block, Index units) {
    const Index rest = units - block * V;
    return rest < V ? static_cast<int>(rest) : V;
}

// Values that a cell takes in addition to gates and states (gpu_rnn/core/cell_inputs.py).
struct Auxiliary {
    const scalar* units;   // [N, unit_rows, H]; unit_rows is B, or 1 where all batch rows have the same
    const uint8_t* flags;  // [T, B], bit k is flag k
    const uint64_t* seed;  // [heads]
};

struct Code;  // of a cell, below

struct Forward {
    const Code* cell;
    Index T, B, I, H, P, heads;
    Index D, Q;             // H / heads and P / heads
    Index passes;           // time steps that have the same x, one after the other; of two, each reads other gates of R h
    Index gates[2][2];      // by pass the first of them, and the one after the last; of one pass twice the same
    Index openmp;           // whether the caller's library has an OpenMP, whose threads are used
    Index reverse, threads;
    Index x_time, x_row;    // elements from one time step of x to the next, and from one row
    Index unit_rows;        // of aux.units
    const scalar* x;        // [T / passes, B, I]; [.., G, H], the input projection of all gates, where W is null
    const scalar* W;        // [G, H, I] input weights, or null
    const scalar* R;        // [G, H, Q] recurrent weights
    const scalar* b_x;      // [G, H] or null
    const scalar* b_h;      // [G, H] or null
    const scalar* W_hr;     // [P, H] projects h, of one head; or null: then P = H
    Auxiliary aux;
    scalar* y;              // [T, B, P] written
    scalar* saved;          // [heads, T, B, blocks of D, K, V] by n, written; null, as the next, where it isn't kept
    scalar* h_unprojected;  // [T, B, H] written; only with W_hr
    const scalar* packed;   // what `pack` made of W, R and W_hr; or null, and the call packs them itself
    const scalar* first[MAX_STATES];  // [B, P], then [B, H]: the states before
    scalar* last[MAX_STATES];         // the same, written: the states after
    scalar* cell_states[MAX_STATES];  // of states from 1 on [T+1, B, H], written: after time step t, then the first; or null
};

struct Backward {
    const Code* cell;
    Index T, B, I, H, P, heads, D, Q, passes, gates[2][2], openmp;  // as in Forward
    Index reverse, threads, threads_after;  // of the time loop, and of the products after it
    Index x_time, x_row, unit_rows;  // as in Forward
    const scalar* x;              // [T / passes, B, I]
    const scalar* W;              // [G, H, I] or null
    const scalar* R;              // [G, H, Q]
    const scalar* W_hr;           // [P, H] or null
    Auxiliary aux;
    const scalar* y;              // [T, B, P]
    const scalar* saved;          // as in Forward
    const scalar* h_unprojected;  // as in Forward
    const scalar* h0;             // [B, P]
    const scalar* dy;             // [T, B, P]
    scalar* dWx;                  // [T, B, G, H] written: gradient of the input projection of all gates
    scalar* dWx_sum;              // [T / passes, B, G, H] written: its sums over passes; dWx for one, or null
    scalar* dRh;                  // the same of the recurrent projection; it is dWx where the two are equal
    scalar* dy_total;             // [T, B, P] written: gradient of y, later time steps included; null without W_hr
    scalar* dunits;               // [TRAINABLE, B, H] added to
    scalar* dx;                   // [T / passes, B, I] written; null, as all that follow, where it isn't wanted
    scalar* dW;                   // [G, H, I] written
    scalar* dR;                   // [G, H, Q] written
    scalar* db_x;                 // [G, H] written
    scalar* db_h;                 // [G, H] written
    scalar* dW_hr;                // [P, H] written
    scalar* dunits_sum;           // [TRAINABLE, H] written: dunits, summed over the batch
    const scalar* dlast[MAX_STATES];     // gradients of the states after
    scalar* dfirst[MAX_STATES];          // gradients of the states before, written; on the way those at state index n
    const scalar* cell_states[MAX_STATES];  // as in Forward
    const scalar* dhistory[MAX_STATES];  // [T, B, H] gradients of the cell states after every time step, or null
};

// Gates of some batch rows and blocks of units, of rows so far apart: as a product gives them, [rows][blocks][G][V]; or with
// start [blocks][G][V], which is added, as they lie in x, [rows][G][H].
struct Gates {
    const scalar* data;
    Index row;
    const scalar* start = nullptr;
};

// Batch rows [b0, b1) and blocks of units [u0, u1).
struct Range {
    Index b0, b1, u0, u1;
};

// A cell, compiled for one CPU (cell.cpp). Where it REDUCES, a range has whole rows.
struct Code {
    Index G, S, K, RECURRENT_INPUT, REDUCES;
    Index HOLD;  // the bit of the flag that keeps the states, or -1
    Index TRAINABLE, SEPARATE;
    void (*step)(const Forward&, Index n, Range, Gates Wx, Gates Rh, scalar* h);
    void (*recurrent_input)(const Forward&, Index n, Range, const scalar* h, scalar* out);
    void (*grad)(const Backward&, Index n, Range, Gates dh);
    void (*recurrent_input_grad)(const Backward&, Index n, Range, Gates dh);
};
