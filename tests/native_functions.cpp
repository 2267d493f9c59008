// The functions of simd.h over arrays whose length PAIR vectors divide, for the tests.
extern "C" {
#define OVER(name)                                                                         \
    void over_##name(const scalar* in, scalar* out, Index size) {                          \
        for (Index at = 0; at < size; at += PAIR * V) {                                    \
            real a;                                                                        \
            for (int i = 0; i < PAIR; ++i) a.v[i] = load(in + at + i * V);                 \
            a = name(a);                                                                   \
            for (int i = 0; i < PAIR; ++i) store(out + at + i * V, a.v[i]);                \
        }                                                                                  \
    }
OVER(exp) OVER(sigmoid) OVER(tanh) OVER(log) OVER(rsqrt) OVER(positive)
}
