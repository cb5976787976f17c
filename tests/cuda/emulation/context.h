// A stack of execution and the switch from one to another.
//
// x86-64 has a switch of its own, because swapcontext's two system calls would be most of the emulation's time.
#pragma once

#include <pthread.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {

#ifdef __x86_64__

// Saves what a call must preserve on the running stack, leaves its pointer in *save and goes on with stack `next`.
[[gnu::naked, gnu::noinline]] inline void switch_stack(void** /* save */, void* /* next */) {
  asm("push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
      "mov %rsp, (%rdi)\n"
      "mov %rsi, %rsp\n"
      "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n"
      "ret\n");
}

class Registers {
 public:
  void prepare(char* bottom, size_t size, void (*entry)()) {
    // switch_stack pops six registers and returns to `entry`, which finds the stack as after a call.
    auto* top = reinterpret_cast<uintptr_t*>((reinterpret_cast<uintptr_t>(bottom) + size - 64) / 16 * 16);
    *top = reinterpret_cast<uintptr_t>(entry);
    std::memset(top - 6, 0, 6 * sizeof(uintptr_t));
    pointer_ = top - 6;
  }
  void switch_to(Registers& next) { switch_stack(&pointer_, next.pointer_); }

 private:
  void* pointer_ = nullptr;
};

#else

class Registers {
 public:
  void prepare(char* bottom, size_t size, void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = bottom;
    context_.uc_stack.ss_size = size;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }
  void switch_to(Registers& next) { swapcontext(&context_, &next.context_); }

 private:
  ucontext_t context_;
};

#endif

// Registers, and what AddressSanitizer must know of the stack.
class Context {
 public:
  // Starts `entry` on this stack at the next switch to it.
  void prepare(char* bottom, size_t size, void (*entry)()) {
    bottom_ = bottom;
    size_ = size;
    fake_stack_ = nullptr;
#ifdef __SANITIZE_ADDRESS__
    ASAN_UNPOISON_MEMORY_REGION(bottom, size);  // the last thread on this stack never returned from its frames
#endif
    registers_.prepare(bottom, size, entry);
  }

  // Takes the running stack of the process for its own.
  void adopt_own_stack() {
    pthread_attr_t attributes;
    void* bottom = nullptr;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &bottom, &size_);
    pthread_attr_destroy(&attributes);
    bottom_ = bottom;
  }

  void switch_to(Context& next, bool forever = false) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(forever ? nullptr : &fake_stack_, next.bottom_, next.size_);
#else
    (void)forever;
#endif
    registers_.switch_to(next.registers_);
    arrived();
  }

  // The first thing that runs after a switch to this context.
  void arrived() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
  }

 private:
  Registers registers_;
  void* fake_stack_ = nullptr;
  const void* bottom_ = nullptr;
  size_t size_ = 0;
};

}  // namespace emulation
