// Stacks that take turns on one thread, for the emulator alone. What AddressSanitizer and ThreadSanitizer must be told of a
// switch goes through weak symbols: they are there when the runtime of a sanitizer is linked in.
#pragma once

#include <pthread.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#error "compile the emulator itself without sanitizers: it switches stacks and shares its state between fibers"
#endif

extern "C" {
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** fake_stack, const void* stack, size_t bytes);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* fake_stack, const void** old_stack, size_t* old_bytes);
__attribute__((weak)) void __asan_poison_memory_region(const volatile void* start, size_t bytes);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void* start, size_t bytes);
__attribute__((weak)) void* __tsan_get_current_fiber();
__attribute__((weak)) void* __tsan_create_fiber(unsigned flags);
__attribute__((weak)) void __tsan_destroy_fiber(void* fiber);
__attribute__((weak)) void __tsan_switch_to_fiber(void* fiber, unsigned flags);
__attribute__((weak)) void __tsan_acquire(void* address);
__attribute__((weak)) void __tsan_release(void* address);
}

namespace gcnet_ext::cuda::emulation {

constexpr unsigned kNoSync = 1;  // for __tsan_switch_to_fiber: the switch orders nothing

struct Fiber {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  char* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;
  void* tsan = nullptr;
};

inline bool under_thread_sanitizer() { return __tsan_create_fiber != nullptr; }
inline void sanitizer_acquire(void* address) {
  if (__tsan_acquire) __tsan_acquire(address);
}
inline void sanitizer_release(void* address) {
  if (__tsan_release) __tsan_release(address);
}

#if defined(__x86_64__)
// Pushes the registers that a call preserves onto the old stack, and pops them from the new one. (swapcontext would do, but it
// takes ten times as long, for two system calls that set the signal mask.)
__attribute__((naked, noinline)) static void switch_stack(void** /*from*/, void* /*to*/) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
}
#endif

// Makes a fiber that runs entry() on this stack; entry never returns. ThreadSanitizer knows the fiber as `tsan`.
inline void create_fiber(Fiber& fiber, char* stack, size_t bytes, void* tsan, void (*entry)()) {
  fiber.tsan = tsan;
  fiber.stack = stack;
  fiber.stack_bytes = bytes;
#if defined(__x86_64__)
  constexpr int kSaved = 6;  // registers that switch_stack pops before it returns into entry
  void** top = reinterpret_cast<void**>(stack + bytes) - 2;
  std::memset(top - kSaved, 0, (kSaved + 2) * sizeof(void*));
  *top = reinterpret_cast<void*>(entry);
  fiber.stack_pointer = top - kSaved;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#endif
}

// Takes the poison off a stack. A failed launch leaves fibers behind in the middle of their work, with red zones on their
// stacks.
inline void forget_stack(void* stack, size_t bytes) {
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(stack, bytes);
}

// Makes a fiber of the thread that calls this, so that others can switch back to it.
inline void adopt_host(Fiber& host) {
  if (__tsan_get_current_fiber) host.tsan = __tsan_get_current_fiber();
  if (!__sanitizer_start_switch_fiber) return;
  pthread_attr_t attributes;
  void* stack = nullptr;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &stack, &host.stack_bytes);
  pthread_attr_destroy(&attributes);
  host.stack = static_cast<char*>(stack);
}

// A new fiber calls this before anything else.
inline void fiber_started() {
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
}

// Switches from one fiber to another, without ordering memory between them. `last`: nobody will switch back.
inline void switch_fiber(Fiber& from, Fiber& to, bool last) {
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(to.tsan, kNoSync);
#if defined(__x86_64__)
  switch_stack(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
}

}  // namespace gcnet_ext::cuda::emulation
