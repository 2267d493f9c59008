// context.h: a stack and the registers to continue on it. 2 ns a switch in assembly on x86-64; ucontext
// elsewhere.
#pragma once
#include <cstddef>

#if !defined(__x86_64__) || HOST_UCONTEXT
#include <ucontext.h>
#endif

namespace host {

struct Context {
#if defined(__x86_64__) && !HOST_UCONTEXT
    void* stack_pointer = nullptr;
#else
    ucontext_t ucontext;
#endif

    void prepare(unsigned char* stack, size_t bytes, void (*entry)());
    void switch_to(Context& other);  // returns when someone switches back

    // Whether the stack that begins at `stack` has been outgrown, as far as the last switch can tell.
    bool overflowed(const unsigned char* stack) const;
};

}  // namespace host
