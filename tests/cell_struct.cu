// cell_struct.cu: a cell's struct and the functions it calls alone, one thread per row. Tests compare them with the definition.

DEVICE long long own_row() { return static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; }

extern "C" __global__ void twin_step(const real* x,      // [n, G]
                                     const real* h,      // [n, G]
                                     real* state,        // [n, S] overwritten
                                     real* saved,        // [n, K] written
                                     long long n) {
    const long long i = own_row();
    if (i < n) Cell::step(x + i * Cell::G, h + i * Cell::G, state + i * Cell::S, saved + i * Cell::K);
}
EXPORT(twin_step)

extern "C" __global__ void twin_grad(const real* dnew,    // [n, S]
                                     const real* next,    // [n, S]
                                     const real* before,  // [n, S]
                                     const real* saved,   // [n, K]
                                     real* dx,            // [n, G] written
                                     real* dh,            // [n, G] written
                                     real* dbefore,       // [n, S] written
                                     long long n) {
    const long long i = own_row(), g = i * Cell::G, s = i * Cell::S, k = i * Cell::K;
    if (i < n) Cell::grad(dnew + s, next + s, before + s, saved + k, dx + g, dh + g, dbefore + s);
}
EXPORT(twin_grad)

extern "C" __global__ void functions(const real* a,  // [n]
                                     real* out,      // [6, n] written
                                     long long n) {
    const long long i = own_row();
    if (i >= n) return;
    out[i] = sigmoid(a[i]);
    out[n + i] = tanh(a[i]);
    out[2 * n + i] = exp(a[i]);
    out[3 * n + i] = log(a[i]);
    out[4 * n + i] = relu(a[i]);
    out[5 * n + i] = positive(a[i]);
}
EXPORT(functions)
