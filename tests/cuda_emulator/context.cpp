#include "context.h"

#include <cstring>

#if defined(__x86_64__) && !HOST_UCONTEXT

// Saves what the System V ABI lets no call change (the six registers; the return address lies on the stack
// already), changes stacks, and restores the same from there. Floating-point control words are the same in
// all fibers.
extern "C" __attribute__((visibility("hidden"))) void host_switch_stacks(void** save_to, void* load_from);
asm(R"(
.text
.globl host_switch_stacks
.hidden host_switch_stacks
.type host_switch_stacks, @function
host_switch_stacks:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size host_switch_stacks, .-host_switch_stacks
)");

namespace host {

constexpr size_t saved_registers = 6;

void Context::prepare(unsigned char* stack, size_t bytes, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + bytes);
    *--top = nullptr;  // where `entry` would return to, but never does; aligns the stack as after a call
    *--top = reinterpret_cast<void*>(entry);
    top -= saved_registers;
    std::memset(top, 0, saved_registers * sizeof *top);
    stack_pointer = top;
}

void Context::switch_to(Context& other) { host_switch_stacks(&stack_pointer, other.stack_pointer); }

bool Context::overflowed(const unsigned char* stack) const {
    return static_cast<const unsigned char*>(stack_pointer) < stack + 1024;
}

}  // namespace host

#else

namespace host {

void Context::prepare(unsigned char* stack, size_t bytes, void (*entry)()) {
    getcontext(&ucontext);
    ucontext.uc_stack.ss_sp = stack;
    ucontext.uc_stack.ss_size = bytes;
    ucontext.uc_link = nullptr;
    makecontext(&ucontext, entry, 0);
}

void Context::switch_to(Context& other) { swapcontext(&ucontext, &other.ucontext); }

bool Context::overflowed(const unsigned char*) const { return false; }

}  // namespace host

#endif
