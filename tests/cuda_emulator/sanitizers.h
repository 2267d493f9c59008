// sanitizers.h: what the runtime tells ThreadSanitizer and AddressSanitizer. In a plain build all of it is
// empty.
//
// The runtime itself is not instrumented: its own bookkeeping is single-threaded. So it says by hand which of
// its actions order memory (release, acquire) and which touch the kernel's memory (note_read, note_write).
#pragma once
#include <cstddef>

#if HOST_TSAN
#include <sanitizer/tsan_interface.h>
extern "C" {
void __tsan_read_range(void* address, unsigned long bytes);
void __tsan_write_range(void* address, unsigned long bytes);
void __tsan_func_entry(void* caller);
void __tsan_func_exit();
void __tsan_ignore_thread_begin();
void __tsan_ignore_thread_end();
}
#endif
#if HOST_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
extern "C" {
void __asan_loadN(const void* address, unsigned long bytes);
void __asan_storeN(void* address, unsigned long bytes);
}
#endif

namespace host {

#if HOST_TSAN || HOST_ASAN
constexpr size_t stack_bytes = 256 << 10;  // instrumented frames are larger
#else
constexpr size_t stack_bytes = 64 << 10;
#endif

inline void release([[maybe_unused]] const void* token) {
#if HOST_TSAN
    __tsan_release(const_cast<void*>(token));
#endif
}
inline void acquire([[maybe_unused]] const void* token) {
#if HOST_TSAN
    __tsan_acquire(const_cast<void*>(token));
#endif
}

// While one lives, ThreadSanitizer does not look. The runtime's containers are touched by all fibers, and the
// library functions that they call (malloc, memmove) would be seen even though the runtime is not
// instrumented.
class Unseen {
  public:
#if HOST_TSAN
    Unseen() { __tsan_ignore_thread_begin(); }
    ~Unseen() { __tsan_ignore_thread_end(); }
#else
    Unseen() {}
#endif
    Unseen(const Unseen&) = delete;
};

inline void note_read([[maybe_unused]] const void* address, [[maybe_unused]] size_t bytes) {
#if HOST_TSAN
    __tsan_read_range(const_cast<void*>(address), bytes);
#elif HOST_ASAN
    __asan_loadN(address, bytes);
#endif
}
inline void note_write([[maybe_unused]] void* address, [[maybe_unused]] size_t bytes) {
#if HOST_TSAN
    __tsan_write_range(address, bytes);
#elif HOST_ASAN
    __asan_storeN(address, bytes);
#endif
}

inline void forbid_access([[maybe_unused]] void* address, [[maybe_unused]] size_t bytes) {
#if HOST_ASAN
    __asan_poison_memory_region(address, bytes);
#endif
}
inline void allow_access([[maybe_unused]] void* address, [[maybe_unused]] size_t bytes) {
#if HOST_ASAN
    __asan_unpoison_memory_region(address, bytes);
#endif
}

// A thread of execution as ThreadSanitizer sees it. Switching between them orders nothing by itself.
class Strand {
  public:
    // The strand of the launch itself. A new strand comes after what its creator did, so all are created on
    // this one.
    inline static const Strand* launcher = nullptr;

    void start() {
#if HOST_TSAN
        if (!fiber) {
            Strand caller;
            caller.be_current_thread();
            launcher->switch_to();
            fiber = __tsan_create_fiber(0);
            caller.switch_to();
        }
#endif
    }
    // The end: a strand that acquires `token` comes after everything that this strand did.
    void end([[maybe_unused]] const void* token) {
#if HOST_TSAN
        if (fiber) {
            switch_to();
            release(token);
            launcher->switch_to();
            __tsan_destroy_fiber(fiber);
        }
#endif
        fiber = nullptr;
    }
    void be_current_thread() {
#if HOST_TSAN
        fiber = __tsan_get_current_fiber();
#endif
    }
    void switch_to() const {
#if HOST_TSAN
        __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync);
#endif
    }

    // Attributes `action` to this strand, as called from `site`, after all that released `token` so far.
    template <class Action>
    void perform([[maybe_unused]] const void* token, [[maybe_unused]] const void* site, Action action) {
#if HOST_TSAN
        start();
        Strand caller;
        caller.be_current_thread();
        switch_to();
        acquire(token);
        __tsan_func_entry(const_cast<void*>(site));
        action();
        __tsan_func_exit();
        caller.switch_to();
#else
        action();
#endif
    }

  private:
    void* fiber = nullptr;
};

}  // namespace host
