// The SIMT machine: fibers that stand for the threads of one block, and where they meet.
//
// A fiber runs until it must wait for others: at a block's barrier, or at a collective of its
// warp. Then a random one of those that can go on does. When none can, threads wait for
// something that will never happen, and the launch fails with the places where they wait.
//
// At a collective every lane leaves a pointer to what it brings; the last one to come computes
// for all of them (`Machine::together`), so that a collective costs one switch per lane.
//
// Included by simt.h only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace simt {

// What nobody wrote: a NaN in every float format, and an index beyond everything.
constexpr unsigned char POISON = 0xff;
// Around dynamic shared memory; checked when a block ends.
constexpr unsigned char GUARD = 0xa5;
constexpr size_t GUARD_BYTES = 256;
// Sanitizers make frames several times larger. Untouched pages cost nothing.
constexpr size_t STACK_BYTES = 512 << 10;
constexpr unsigned MAX_THREADS = 1024;
constexpr unsigned WARP = 32;

// Where in a kernel's source something happens; default arguments of the intrinsics fill it in.
struct Site {
  const char* what;
  const char* file;
  int line;
  bool operator==(const Site& other) const { return line == other.line && std::strcmp(what, other.what) == 0; }
};

// ---- Switching stacks --------------------------------------------------------------------------

#if defined(__x86_64__)
// Saves what a call must preserve (System V), changes stacks and restores; about three
// nanoseconds, where swapcontext makes a system call for the signal mask.
extern "C" void simt_switch_stacks(void** save, void* load);
asm(R"(
.text
.p2align 4
.local simt_switch_stacks
.type simt_switch_stacks, @function
simt_switch_stacks:
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
.size simt_switch_stacks, .-simt_switch_stacks
)");

struct Context {
  void* stack_pointer = nullptr;

  void prepare(unsigned char* stack, size_t bytes, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + bytes);
    *--top = nullptr;                           // a return address that is never used
    *--top = reinterpret_cast<void*>(entry);    // what `ret` jumps to, on an aligned stack
    for (int i = 0; i < 6; i++) *--top = nullptr;
    stack_pointer = top;
  }
  static void change(Context& from, Context& to) { simt_switch_stacks(&from.stack_pointer, to.stack_pointer); }
};
#else
struct Context {
  ucontext_t context;

  void prepare(unsigned char* stack, size_t bytes, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  static void change(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};
#endif

// ---- The machine -------------------------------------------------------------------------------

struct Fiber {
  enum State { READY, WAITING, ENDED };
  Context context;
  unsigned char* stack;
  dim3 thread;
  unsigned flat;
  State state;
  bool released;       // what it waited for has happened
  Site site;           // where it waits
  uint32_t mask;       // with which lanes of its warp; 0: with its block
  void* brought;       // what it brings to a collective

  unsigned lane() const { return flat % WARP; }
  unsigned warp() const { return flat / WARP; }
};

struct Kernel {
  const char* name;
  // One letter per parameter: p pointer, f float, i four bytes, l eight bytes.
  std::string signature;
  void (*call)(void** arguments);
};

class Machine {
 public:
  Fiber* current = nullptr;
  dim3 block, block_size, grid_size;

  Machine() {
    void* memory = mmap(nullptr, MAX_THREADS * STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    for (unsigned i = 0; i < MAX_THREADS; i++) fibers_[i].stack = static_cast<unsigned char*>(memory) + i * STACK_BYTES;
  }

  // Runs all blocks; null, or what went wrong.
  const char* launch(const Kernel& kernel, dim3 grid, dim3 block, size_t shared_bytes, void** arguments, uint64_t seed) {
    kernel_ = &kernel, grid_size = grid, block_size = block, arguments_ = arguments;
    random_ = seed * 0x9e3779b97f4a7c15 | 1;
    threads_ = block.x * block.y * block.z;
    error_.clear();
    if (threads_ == 0 || threads_ > MAX_THREADS) return error_ = where() + ": a block of " + std::to_string(threads_) + " threads", error_.c_str();
    allocate_shared(shared_bytes);
    std::vector<unsigned> order(size_t(grid.x) * grid.y * grid.z);
    for (unsigned i = 0; i < order.size(); i++) order[i] = i;
    for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[below(i)]);
    for (unsigned index : order) {
      this->block = dim3(index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y);
      run_block();
      if (!error_.empty()) return error_.c_str();
    }
    return nullptr;
  }

  void* dynamic_shared() { return shared_; }

  // __syncthreads: until every thread that has not ended is here.
  void block_barrier(Site site) {
    if (arrived_ > 0 && !(site == barrier_site_)) {
      current->site = site, current->mask = 0, current->state = Fiber::WAITING;
      fail("threads of a block wait at different barriers");
    }
    barrier_site_ = site;
    arrived_++;
    if (arrived_ == live_) {
      open_barrier();
      maybe_let_others_go_first();
      return;
    }
    current->site = site, current->mask = 0, current->released = false;
    while (!current->released) wait();
  }

  // Until all lanes of `mask` that have not ended are here with the same mask; the last one to
  // come calls `compute` with what each lane brought (null for lanes that are not there).
  template <class T, class Compute>
  void together(uint32_t mask, Site site, T& mine, Compute compute) {
    Fiber& me = *current;
    if (!(mask >> me.lane() & 1)) fail_at(site, "a lane calls a collective whose mask leaves it out");
    me.site = site, me.mask = mask, me.brought = &mine, me.released = false;
    Fiber* const warp = fibers_ + me.warp() * WARP;
    waiting_[me.warp()] |= 1u << me.lane();
    while (!me.released) {
      const uint32_t need = mask & live_lanes_[me.warp()];
      if (!all_here(warp, need, mask, site)) {
        wait();
        continue;
      }
      T* lanes[WARP] = {};
      for (unsigned i = 0; i < WARP; i++)
        if (need >> i & 1) lanes[i] = static_cast<T*>(warp[i].brought);
      compute(lanes);
      waiting_[me.warp()] &= ~need;
      for (unsigned i = 0; i < WARP; i++)
        if (need >> i & 1) release(warp[i]);
      maybe_let_others_go_first();
    }
  }

  // For errors in a kernel that only the machine can see; does not return.
  [[noreturn]] void fail_at(Site site, const char* what) {
    current->site = site, current->mask = 0, current->state = Fiber::WAITING;
    fail(what);
  }

 private:
  Fiber fibers_[MAX_THREADS];
  std::vector<Fiber*> ready_;
  unsigned threads_ = 0, live_ = 0, arrived_ = 0;
  Site barrier_site_ = {};
  uint32_t live_lanes_[MAX_THREADS / WARP], waiting_[MAX_THREADS / WARP];
  Context caller_;
  const Kernel* kernel_ = nullptr;
  void** arguments_ = nullptr;
  std::vector<unsigned char> shared_memory_;
  unsigned char* shared_ = nullptr;
  size_t shared_bytes_ = 0;
  uint64_t random_ = 1;
  std::string error_;
#if defined(__SANITIZE_ADDRESS__)
  const void* caller_stack_ = nullptr;
  size_t caller_stack_bytes_ = 0;
#endif

  uint64_t random() {
    random_ ^= random_ >> 12, random_ ^= random_ << 25, random_ ^= random_ >> 27;
    return random_ * 0x2545f4914f6cdd1d >> 11;
  }
  size_t below(size_t bound) { return random() % bound; }

  // Memory of exactly the size that the launch asks for: one byte more is a guard.
  void allocate_shared(size_t bytes) {
    constexpr size_t ALIGN = 128;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(shared_memory_.data(), shared_memory_.size());
#endif
    shared_memory_.assign(bytes + 2 * GUARD_BYTES + ALIGN, GUARD);
    const uintptr_t start = reinterpret_cast<uintptr_t>(shared_memory_.data()) + GUARD_BYTES;
    shared_ = reinterpret_cast<unsigned char*>((start + ALIGN - 1) / ALIGN * ALIGN);
    shared_bytes_ = bytes;
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(shared_ + bytes, GUARD_BYTES);
#endif
  }

  void run_block() {
    std::memset(shared_, POISON, shared_bytes_);
    poison_static_shared();
    live_ = threads_, arrived_ = 0;
    ready_.clear();
#if defined(__SANITIZE_ADDRESS__)
    caller_stack_ = nullptr;
#endif
    for (unsigned i = 0; i < threads_; i++) start(fibers_[i], i);
    const unsigned warps = (threads_ + WARP - 1) / WARP;
    for (unsigned w = 0; w < warps; w++) {
      const unsigned lanes = threads_ - w * WARP;
      live_lanes_[w] = lanes >= WARP ? ~0u : (1u << lanes) - 1;
      waiting_[w] = 0;
    }
    go_to_next(caller_, nullptr);
#if !defined(__SANITIZE_ADDRESS__)
    for (size_t i = 0; i < GUARD_BYTES && error_.empty(); i++)
      if (shared_[shared_bytes_ + i] != GUARD) error_ = where() + ": wrote beyond its " + std::to_string(shared_bytes_) + " bytes of dynamic shared memory";
#endif
  }

  void start(Fiber& fiber, unsigned flat) {
    fiber.flat = flat, fiber.state = Fiber::READY, fiber.released = true;
    fiber.thread = dim3(flat % block_size.x, flat / block_size.x % block_size.y, flat / block_size.x / block_size.y);
#if defined(__SANITIZE_ADDRESS__)
    // Of an earlier run only frames at the top are left, which ended without returning.
    constexpr size_t LEFT_BYTES = 16 << 10;
    __asan_unpoison_memory_region(fiber.stack + STACK_BYTES - LEFT_BYTES, LEFT_BYTES);
#endif
    fiber.context.prepare(fiber.stack, STACK_BYTES, &Machine::entry);
    ready_.push_back(&fiber);
  }

  // What every fiber runs. Never returns: there is nothing below it on its stack.
  static void entry();

  void end_current() {
    Fiber& me = *current;
    me.state = Fiber::ENDED;
    live_--;
    live_lanes_[me.warp()] &= ~(1u << me.lane());
    if (live_ > 0 && arrived_ == live_) open_barrier();
    // Others of the warp may have waited for this lane alone: let them look again.
    for (unsigned i = 0; i < WARP; i++) {
      Fiber& other = fibers_[me.warp() * WARP + i];
      if ((waiting_[me.warp()] >> i & 1) && other.state == Fiber::WAITING) make_ready(other);
    }
    leave();
  }

  void leave() {
    if (live_ == 0) {
      change(current->context, caller_, nullptr, true);
    } else {
      go_to_next(current->context, current);
    }
    std::abort();
  }

  bool all_here(const Fiber* warp, uint32_t need, uint32_t mask, const Site& site) const {
    if ((waiting_[warp->warp()] & need) != need) return false;
    for (unsigned i = 0; i < WARP; i++)
      if ((need >> i & 1) && !(warp[i].mask == mask && warp[i].site == site)) return false;
    return true;
  }

  void open_barrier() {
    arrived_ = 0;
    for (unsigned i = 0; i < threads_; i++)
      if (fibers_[i].state == Fiber::WAITING && fibers_[i].mask == 0) release(fibers_[i]);
  }

  void release(Fiber& fiber) {
    fiber.released = true;
    if (fiber.state == Fiber::WAITING) make_ready(fiber);
  }

  void make_ready(Fiber& fiber) {
    fiber.state = Fiber::READY;
    ready_.push_back(&fiber);
  }

  // The last to come would otherwise always be the first to go.
  void maybe_let_others_go_first() {
    if (ready_.empty() || random() % 4 != 0) return;
    Fiber& me = *current;
    make_ready(me);
    go_to_next(me.context, &me);
  }

  void wait() {
    Fiber& me = *current;
    me.state = Fiber::WAITING;
    if (ready_.empty()) fail("threads wait for others that will not come");
    go_to_next(me.context, &me);
  }

  // A random one of those that can go on; `me` may be the one.
  void go_to_next(Context& from, Fiber* me) {
    const size_t at = below(ready_.size());
    Fiber* next = ready_[at];
    ready_[at] = ready_.back();
    ready_.pop_back();
    current = next;
    if (next == me) return;
    change(from, next->context, next, me != nullptr && me->state == Fiber::ENDED);
    if (me != nullptr) current = me;
  }

  // `to` is null on the way back to the caller of the launch.
  void change(Context& from, Context& context, Fiber* to, bool ends) {
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(ends ? nullptr : &fake_stack, to ? to->stack : caller_stack_, to ? STACK_BYTES : caller_stack_bytes_);
    Context::change(from, context);
    const void* from_stack = nullptr;
    size_t from_bytes = 0;
    __sanitizer_finish_switch_fiber(fake_stack, &from_stack, &from_bytes);
#else
    (void)to, (void)ends;
    Context::change(from, context);
#endif
  }

  std::string where() const {
    auto text = [](dim3 d) { return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")"; };
    return "kernel " + std::string(kernel_->name) + ", grid " + text(grid_size) + ", block size " + text(block_size) + ", block " + text(block);
  }

  // Ends the launch. Fibers are left as they are: a kernel has nothing to clean up.
  [[noreturn]] void fail(const char* what) {
    error_ = where() + ": " + what;
    for (unsigned i = 0; i < threads_;) {
      unsigned last = i;
      while (last + 1 < threads_ && alike(fibers_[i], fibers_[last + 1])) last++;
      describe(i, last);
      i = last + 1;
    }
    ready_.clear();
#if defined(__SANITIZE_ADDRESS__)
    for (unsigned i = 0; i < threads_; i++) __asan_unpoison_memory_region(fibers_[i].stack, STACK_BYTES);
#endif
    change(current->context, caller_, nullptr, true);
    std::abort();
  }

  static bool alike(const Fiber& a, const Fiber& b) {
    return a.state == b.state && (a.state != Fiber::WAITING || (a.site == b.site && a.mask == b.mask));
  }

  void describe(unsigned first, unsigned last) {
    const Fiber& fiber = fibers_[first];
    error_ += "\n  thread " + std::to_string(first) + (last > first ? " to " + std::to_string(last) : std::string());
    if (fiber.state == Fiber::ENDED) error_ += " ended";
    if (fiber.state == Fiber::READY) error_ += " could go on";
    if (fiber.state == Fiber::WAITING) {
      error_ += std::string(" at ") + fiber.site.what + ", " + fiber.site.file + ":" + std::to_string(fiber.site.line);
      char mask[32];
      std::snprintf(mask, sizeof mask, ", mask %08x", fiber.mask);
      if (fiber.mask != 0 && fiber.mask != ~0u) error_ += mask;
    }
  }

  // Static shared memory is all that a library of kernels has in .bss.
  __attribute__((no_sanitize("address", "undefined"))) static void poison_static_shared();
};

// In .data, not in .bss: it must survive the poison.
inline Machine* machine_of_this_library = reinterpret_cast<Machine*>(1);
inline Machine& machine() { return *machine_of_this_library; }

inline void Machine::entry() {
  Machine& m = machine();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, m.caller_stack_ ? nullptr : &m.caller_stack_, m.caller_stack_ ? nullptr : &m.caller_stack_bytes_);
#endif
  m.kernel_->call(m.arguments_);
  m.end_current();
}

extern "C" {
__attribute__((visibility("hidden"))) extern unsigned char __bss_start[];
__attribute__((visibility("hidden"))) extern unsigned char _end[];
}

inline void Machine::poison_static_shared() {
  // By an instruction, since a call of memset would be checked by the address sanitizer, for
  // which the gaps between variables are forbidden.
  unsigned char* to = __bss_start;
#if defined(__x86_64__)
  size_t count = _end - __bss_start;
  asm volatile("rep stosb" : "+D"(to), "+c"(count) : "a"(POISON) : "memory");
#else
  for (volatile unsigned char* at = to; at < _end; at++) *at = POISON;
#endif
}

// ---- What a library of kernels shows -----------------------------------------------------------

// As `machine_of_this_library`.
inline std::vector<Kernel>* kernels_of_this_library = reinterpret_cast<std::vector<Kernel>*>(1);

inline std::vector<Kernel>& kernels() {
  if (reinterpret_cast<uintptr_t>(kernels_of_this_library) == 1) kernels_of_this_library = new std::vector<Kernel>();
  return *kernels_of_this_library;
}

template <class T>
constexpr char letter() {
  static_assert(std::is_pointer_v<T> || std::is_same_v<T, float> || (std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8)),
                "a kernel takes pointers, floats, and integers of four or eight bytes");
  return std::is_pointer_v<T> ? 'p' : std::is_same_v<T, float> ? 'f' : sizeof(T) == 4 ? 'i' : 'l';
}

template <auto kernel>
struct Call;
template <class... Parameters, void (*kernel)(Parameters...)>
struct Call<kernel> {
  static std::string signature() { return {letter<Parameters>()...}; }
  static void call(void** arguments) { unpack(arguments, std::index_sequence_for<Parameters...>{}); }
  template <size_t... I>
  static void unpack(void** arguments, std::index_sequence<I...>) {
    (void)arguments;
    kernel(*static_cast<std::remove_const_t<Parameters>*>(arguments[I])...);
  }
};

template <auto kernel>
bool publish(const char* name) {
  kernels().push_back({name, Call<kernel>::signature(), &Call<kernel>::call});
  return true;
}

}  // namespace simt

// The interface of a library: kernels by index, and a launch, one at a time.
extern "C" {
__attribute__((visibility("default"), used)) inline const char* simt_kernel(unsigned index, const char** signature) {
  auto& kernels = simt::kernels();
  if (index >= kernels.size()) return nullptr;
  *signature = kernels[index].signature.c_str();
  return kernels[index].name;
}

// `sizes`: grid x, y, z, block x, y, z. Null, or an error that is there until the next launch.
__attribute__((visibility("default"), used)) inline const char* simt_launch(unsigned index, const unsigned* sizes, size_t shared_bytes, void** arguments, uint64_t seed) {
  if (reinterpret_cast<uintptr_t>(simt::machine_of_this_library) == 1) simt::machine_of_this_library = new simt::Machine();
  return simt::machine().launch(simt::kernels()[index], dim3(sizes[0], sizes[1], sizes[2]), dim3(sizes[3], sizes[4], sizes[5]), shared_bytes, arguments, seed);
}
}
