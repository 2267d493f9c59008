// The CUDA twin of lstm.py, where the equations are explained: the same names in the same order.
//
//     i, f, o = sigmoid(x + h)     g = tanh(x + h)     c' = f c + i g     h' = o tanh(c')
struct Cell {
    enum { G = 4, S = 2, K = 4 };  // gates i f g o; states h c; saved i f g o

    DEVICE static void step(const real x[G], const real h[G], real state[S], real saved[K]) {
        const real i = sigmoid(x[0] + h[0]);
        const real f = sigmoid(x[1] + h[1]);
        const real g = tanh(x[2] + h[2]);
        const real o = sigmoid(x[3] + h[3]);
        state[1] = f * state[1] + i * g;
        state[0] = o * tanh(state[1]);
        saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o;
    }

    DEVICE static void grad(const real dnew[S], const real next[S], const real before[S], const real saved[K],
                            real dx[G], real dh[G], real dbefore[S]) {
        const real i = saved[0], f = saved[1], g = saved[2], o = saved[3];
        const real t = tanh(next[1]);
        const real dc = dnew[1] + dnew[0] * o * (1 - t * t);
        dx[0] = dh[0] = dc * g * (i * (1 - i));
        dx[1] = dh[1] = dc * before[1] * (f * (1 - f));
        dx[2] = dh[2] = dc * i * (1 - g * g);
        dx[3] = dh[3] = dnew[0] * t * (o * (1 - o));
        dbefore[0] = 0;
        dbefore[1] = dc * f;
    }
};
