// cell_inputs.cuh: the auxiliary inputs of a cell, which it takes in addition to x, h and states: values that an element
// (unit, batch row) has for the whole sequence, flags that a batch row has at a time step, random numbers that an element
// has at a time step.
//
// Random numbers are Philox4x32-10's (Salmon et al. 2011), a function of seed, time step, batch row and unit: forward,
// recomputed and backward they are the same, and those of kernels/philox.py.
#pragma once

constexpr int AUX_UNITS = Cell::PER_UNIT, AUX_FLAGS = Cell::FLAGS, AUX_UNIFORMS = Cell::UNIFORMS;
constexpr int AUX = AUX_UNITS + AUX_FLAGS + AUX_UNIFORMS, AUX_OR_1 = AUX > 0 ? AUX : 1;

// The counter becomes four random words.
DEVICE void philox(unsigned counter[4], unsigned long long seed) {
    unsigned low = static_cast<unsigned>(seed), high = static_cast<unsigned>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const unsigned long long a = 0xD2511F53ull * counter[0], b = 0xCD9E8D57ull * counter[2];
        counter[0] = static_cast<unsigned>(b >> 32) ^ counter[1] ^ low;
        counter[2] = static_cast<unsigned>(a >> 32) ^ counter[3] ^ high;
        counter[1] = static_cast<unsigned>(b);
        counter[3] = static_cast<unsigned>(a);
        low += 0x9E3779B9u, high += 0xBB67AE85u;
    }
}

struct AuxInputs {
    const real* units;               // [PER_UNIT, rows, H]
    const unsigned char* flags;      // [T, B], bit k is flag k
    const unsigned long long* seed;  // [1]
    long long B, H, rows;            // rows: B, or 1 if all batch rows have the same

    DEVICE void of_unit(real aux[AUX_OR_1], long long b, long long unit) const {
        for (int n = 0; n < AUX_UNITS; ++n) aux[n] = units[(n * rows + (rows > 1 ? b : 0)) * H + unit];
    }

    // The flags of a time step, all in one: to be fetched ahead.
    DEVICE unsigned bits(long long t, long long b) const { return AUX_FLAGS > 0 ? flags[t * B + b] : 0; }

    DEVICE static void flags_of(real aux[AUX_OR_1], unsigned bits) {
        for (int n = 0; n < AUX_FLAGS; ++n) aux[AUX_UNITS + n] = (bits >> n & 1) != 0 ? 1 : 0;
    }

    DEVICE void uniforms_of(real aux[AUX_OR_1], long long t, long long b, long long unit) const {
        for (int n = 0; n < AUX_UNIFORMS; n += 4) {
            unsigned words[4] = {static_cast<unsigned>(unit), static_cast<unsigned>(b), static_cast<unsigned>(t),
                                 static_cast<unsigned>(n / 4)};
            philox(words, *seed);
            for (int i = 0; i < 4 && n + i < AUX_UNIFORMS; ++i)
                aux[AUX_UNITS + AUX_FLAGS + n + i] = static_cast<real>(words[i] >> 8) * real(5.9604644775390625e-8);
        }
    }
};
