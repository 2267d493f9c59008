// The CUDA twin of gru.py, where the equations are explained: the same names in the same order.
//
//     r, z = sigmoid(x + h)     n = tanh(x_n + r h_n)     h' = n + z (h - n)
struct Cell {
    enum { G = 3, S = 1, K = 4 };  // gates r z n; state h; saved r z n and q = h_n

    DEVICE static void step(const real x[G], const real h[G], real state[S], real saved[K]) {
        const real r = sigmoid(x[0] + h[0]);
        const real z = sigmoid(x[1] + h[1]);
        const real n = tanh(x[2] + r * h[2]);
        state[0] = n + z * (state[0] - n);
        saved[0] = r, saved[1] = z, saved[2] = n, saved[3] = h[2];
    }

    DEVICE static void grad(const real dnew[S], const real[S], const real before[S], const real saved[K], real dx[G],
                            real dh[G], real dbefore[S]) {
        const real r = saved[0], z = saved[1], n = saved[2], q = saved[3];
        const real dn = dnew[0] * (1 - z) * (1 - n * n);
        dx[0] = dh[0] = dn * q * (r * (1 - r));
        dx[1] = dh[1] = dnew[0] * (before[0] - n) * (z * (1 - z));
        dx[2] = dn;
        dh[2] = dn * r;
        dbefore[0] = dnew[0] * z;
    }
};
