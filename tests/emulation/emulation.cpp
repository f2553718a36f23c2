// Scheduler of fibers and the host API behind the stand-in <cuda_runtime.h>, which says what it
// proves.
#include <cuda_runtime.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cfenv>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#ifdef MMBAL_EMULATION_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef MMBAL_EMULATION_TSAN
#include <sanitizer/tsan_interface.h>
#endif
#ifndef __x86_64__
#include <ucontext.h>
#endif

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

#ifdef __x86_64__
// void (void** save, void* restore): swapcontext without its system calls for the signal mask.
extern "C" void mmbal_emulation_switch(void** save, void* restore)
    __attribute__((visibility("hidden")));
__asm__(R"(
.text
.hidden mmbal_emulation_switch
.globl mmbal_emulation_switch
.type mmbal_emulation_switch, @function
mmbal_emulation_switch:
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
.size mmbal_emulation_switch, .-mmbal_emulation_switch
)");
#endif

namespace emulation {
namespace {

constexpr size_t stack_bytes = 128 * 1024;  // address space: pages are there once touched
constexpr uint64_t garbage = ~uint64_t{0};
// Memory that a block had and another gets would look like memory that they share: with the race
// detector each has an OS thread, and with it `__shared__`, and stacks to itself.
#ifdef MMBAL_EMULATION_TSAN
constexpr bool fresh_memory = true;
#else
constexpr bool fresh_memory = false;
#endif

void fiber_main();

// A stack with a guard page below, and the place where it was left.
class Stack {
 public:
  Stack() : guard_(static_cast<size_t>(sysconf(_SC_PAGESIZE))) {
    void* memory = mmap(nullptr, guard_ + stack_bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, guard_, PROT_NONE) != 0) {
      std::perror("cuda emulation: stack of a thread");
      std::abort();
    }
    base_ = static_cast<char*>(memory) + guard_;
  }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;
  ~Stack() {
#ifdef MMBAL_EMULATION_TSAN
    if (thread_ != nullptr) __tsan_destroy_fiber(thread_);
#endif
    munmap(base_ - guard_, guard_ + stack_bytes);
  }

  // Next enter() starts fiber_main.
  void prepare() {
#ifdef MMBAL_EMULATION_ASAN
    fake_ = nullptr;
#endif
#ifdef __x86_64__
    void** top = reinterpret_cast<void**>(base_ + stack_bytes);
    std::fill(top - 8, top,
              nullptr);  // six registers, return address, return address of fiber_main
    top[-2] = reinterpret_cast<void*>(&fiber_main);
    fiber_ = top - 8;
#else
    getcontext(&fiber_);
    fiber_.uc_stack.ss_sp = base_;
    fiber_.uc_stack.ss_size = stack_bytes;
    fiber_.uc_link = nullptr;
    makecontext(&fiber_, fiber_main, 0);
#endif
#ifdef MMBAL_EMULATION_TSAN
    // Comes after what the scheduler's thread has done.
    if (thread_ == nullptr) {
      thread_ = __tsan_create_fiber(0);
    } else {
      void* const scheduler = __tsan_get_current_fiber();
      __tsan_release(this);
      __tsan_switch_to_fiber(thread_, __tsan_switch_to_fiber_no_sync);
      __tsan_acquire(this);
      __tsan_switch_to_fiber(scheduler, __tsan_switch_to_fiber_no_sync);
    }
#endif
  }

  // The fiber that waits here will never leave its frames.
  void abandon() {
#ifdef MMBAL_EMULATION_ASAN
    __asan_unpoison_memory_region(base_, stack_bytes);
#endif
  }

#ifdef MMBAL_EMULATION_TSAN
  void* thread() const { return thread_; }
#endif

  // Scheduler: run the fiber until it leaves.
  void enter() {
#ifdef MMBAL_EMULATION_ASAN
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, base_, stack_bytes);
#endif
#ifdef MMBAL_EMULATION_TSAN
    scheduler_thread_ = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(thread_, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef __x86_64__
    mmbal_emulation_switch(&scheduler_, fiber_);
#else
    swapcontext(&scheduler_, &fiber_);
#endif
#ifdef MMBAL_EMULATION_ASAN
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }

  // Fiber: to be called first.
  void entered() {
#ifdef MMBAL_EMULATION_ASAN
    __sanitizer_finish_switch_fiber(fake_, &caller_, &caller_bytes_);
#endif
  }

  // Fiber: back to the scheduler.
  void leave([[maybe_unused]] bool for_good) {
#ifdef MMBAL_EMULATION_ASAN
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_, caller_, caller_bytes_);
#endif
#ifdef MMBAL_EMULATION_TSAN
    __tsan_switch_to_fiber(scheduler_thread_, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef __x86_64__
    mmbal_emulation_switch(&fiber_, scheduler_);
#else
    swapcontext(&fiber_, &scheduler_);
#endif
    entered();
  }

 private:
  size_t guard_;
  char* base_;
#ifdef __x86_64__
  void* fiber_ = nullptr;
  void* scheduler_ = nullptr;
#else
  ucontext_t fiber_, scheduler_;
#endif
#ifdef MMBAL_EMULATION_ASAN
  void* fake_ = nullptr;
  const void* caller_ = nullptr;
  size_t caller_bytes_ = 0;
#endif
#ifdef MMBAL_EMULATION_TSAN
  void *thread_ = nullptr, *scheduler_thread_ = nullptr;
#endif
};

struct Fiber {
  enum State { runs, yields, in_block_barrier, in_warp_collective, exited };
  State state = runs;
  uint3 index{};
  std::unique_ptr<Stack> stack;  // none before its first instruction and after its last

  // What it waits for, or what it got.
  const char* operation = nullptr;
  Location at{};
  unsigned mask = 0;
  int source = 0;
  uint64_t value = 0;
};

struct Warp {  // a bit per lane
  unsigned alive = 0, ready = 0, yielded = 0, waiting = 0;
};

// 0..count-1 in an order that a seed determines; seed 0 keeps it.
class Order {
 public:
  Order(uint64_t seed, uint64_t count) : count_(count) {
    if (seed == 0) return;
    const uint64_t random = seed * 0x9e3779b97f4a7c15u;
    start_ = (random >> 40) % count;
    stride_ = random >> 63 ? count - 1 : (random >> 20) % count;
    while (std::gcd(stride_, count) != 1) ++stride_;
  }
  uint64_t operator[](uint64_t i) const {
    return (start_ + i % count_ * (stride_ % count_)) % count_;
  }

 private:
  uint64_t count_, start_ = 0, stride_ = 1;
};

// The turn goes round a ring of workers: one of them runs, the others sleep.
class Turns {
 public:
  explicit Turns(size_t workers) : next_(workers), woken_(workers) {
    for (size_t i = 0; i < workers; ++i) next_[i] = (i + 1) % workers;
  }
  void await(size_t worker) {
    std::unique_lock<std::mutex> lock(mutex_);
    woken_[worker].wait(lock, [&] { return turn_ == worker; });
  }
  void hand_on(size_t worker) {
    if (next_[worker] == worker) return;
    give(next_[worker]);
    await(worker);
  }
  void leave(size_t worker) {
    size_t before = worker;
    while (next_[before] != worker) before = next_[before];
    next_[before] = next_[worker];
    give(next_[worker]);
  }

 private:
  void give(size_t worker) {
    std::lock_guard<std::mutex> lock(mutex_);
    turn_ = worker;
    woken_[worker].notify_one();
  }

  std::vector<size_t> next_;  // of whoever has the turn to read and write
  std::vector<std::condition_variable> woken_;
  std::mutex mutex_;
  size_t turn_ = 0;
};

// One grid. Its workers share it, in turns.
struct Launch {
  const cudaLaunchConfig_t& config;
  const std::function<void()>& run;
  uint64_t seed;
  uint64_t blocks;
  Order order;
  size_t workers;
  Turns turns{workers};
  uint64_t next = 0;
  bool failed = false;
  uint64_t rounds = 0;  // in each of which a block's threads run to where they wait next
  size_t idle = 0;      // rounds in a row in which threads did nothing but spin

  // Every block in flight has looked many times and found nothing changed: none will ever go on.
  bool stuck() const { return idle > 100 * workers; }
};

// What these threads of a block did comes before what any of them will do.
template <class Fibers, class Meets>
void synchronise([[maybe_unused]] const Fibers& all, [[maybe_unused]] Meets&& meets) {
#ifdef MMBAL_EMULATION_TSAN
  const auto meeting = std::make_unique<char>();  // the sanitizer forgets an address that is freed
  void* const scheduler = __tsan_get_current_fiber();
  for (auto* act : {&__tsan_release, &__tsan_acquire}) {
    for (const Fiber& fiber : all) {
      if (!meets(fiber)) continue;
      __tsan_switch_to_fiber(fiber.stack->thread(), __tsan_switch_to_fiber_no_sync);
      act(meeting.get());
    }
  }
  __tsan_switch_to_fiber(scheduler, __tsan_switch_to_fiber_no_sync);
#endif
}

// With the race detector: of launches before, whose threads come before those of this one, and of
// this one, which no other thread of it may be taken for.
std::vector<std::unique_ptr<Stack>> rested_stacks, used_stacks;
constexpr size_t most_stacks = 2048;  // of the 8000 threads that the sanitizer keeps apart

class Worker;
// Of a thread, so that its memory, `__shared__` in it, is there before the first fiber: to the race
// detector the fiber that asks first would have written all of it.
thread_local Worker* current = nullptr;

// Runs blocks one after another on one OS thread.
class Worker {
 public:
  void run(Launch& launch, size_t number) {
    launch.turns.await(number);
    current = this;
    launch_ = &launch;
    number_ = number;
    blockDim = launch.config.blockDim;
    gridDim = launch.config.gridDim;
    const size_t dynamic_bytes = launch.config.dynamicSmemBytes;
    dynamic_ = dynamic_bytes ? std::malloc(dynamic_bytes) : nullptr;
    for (uint64_t i; !launch.failed && (i = launch.next++) < launch.blocks;) {
      const uint64_t block = launch.order[i];
      blockIdx = block_ = {static_cast<unsigned>(block % gridDim.x),
                           static_cast<unsigned>(block / gridDim.x % gridDim.y),
                           static_cast<unsigned>(block / gridDim.x / gridDim.y)};
      if (dynamic_bytes) std::memset(dynamic_, 0xff, dynamic_bytes);
      random_ = launch.seed == 0 ? 0 : (launch.seed + block) * 0x9e3779b97f4a7c15u | 1;
      run_block();
      if (fresh_memory) break;
    }
    std::free(dynamic_);
    current = nullptr;
    launch.turns.leave(number);
  }

  Fiber& running() { return *running_; }
  int lane() const { return static_cast<int>((running_ - fibers_.data()) % warpSize); }
  void* dynamic() const { return dynamic_; }

  void suspend(Fiber::State state) {
    running_->state = state;
    running_->stack->leave(false);
  }

  void fiber_main() {
    running_->stack->entered();
    launch_->run();
#ifdef MMBAL_EMULATION_TSAN
    __tsan_release(launch_);
#endif
    running_->state = Fiber::exited;
    running_->stack->leave(true);
  }

 private:
  void run_block() {
    const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
    fibers_.resize(threads);
    warps_.assign((threads + warpSize - 1) / warpSize, Warp{});
    for (unsigned t = 0; t < threads; ++t) {
      fibers_[t].state = Fiber::runs;
      fibers_[t].index = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
      warps_[t / warpSize].alive |= 1u << t % warpSize;
    }
    for (Warp& warp : warps_) warp.ready = warp.alive;
    alive_ = threads;
    waiting_ = 0;

    const Order order(random_, warps_.size());
    while (alive_ != 0) {
      bool progress = false, yielded = false;
      for (size_t w = 0; w < warps_.size(); ++w) {
        Warp& warp = warps_[order[w]];
        while (warp.ready != 0) {
          const int lane = pick(warp.ready);
          warp.ready &= ~(1u << lane);
          progress |= resume(warp, order[w] * warpSize + static_cast<size_t>(lane));
        }
      }
      for (Warp& warp : warps_) {
        yielded |= warp.yielded != 0;
        warp.ready |= warp.yielded;
        warp.yielded = 0;
      }
      launch_->idle = progress ? 0 : launch_->idle + 1;
      if (!progress) {
        if (launch_->failed) return abandon();
        if (!yielded || launch_->stuck()) return report();
      }
      if (!progress || ++launch_->rounds % 16 == 0) {
        launch_->turns.hand_on(number_);
        blockIdx = block_;
      }
    }
  }

  uint64_t random() {
    random_ ^= random_ << 13, random_ ^= random_ >> 7, random_ ^= random_ << 17;
    return random_ >> 32;
  }

  int pick(unsigned lanes) {
    if (random_ == 0) return __builtin_ctz(lanes);
    const int start = static_cast<int>(random() % warpSize);
    const unsigned from_start = lanes & ~0u << start;
    return __builtin_ctz(from_start ? from_start : lanes);
  }

  // Runs a thread until it waits; false if all it did was to spin.
  bool resume(Warp& warp, size_t thread) {
    Fiber& fiber = fibers_[thread];
    if (!fiber.stack) {
      auto& stacks = fresh_memory ? rested_stacks : stacks_;
      if (stacks.empty()) stacks.push_back(std::make_unique<Stack>());
      fiber.stack = std::move(stacks.back());
      stacks.pop_back();
      fiber.stack->prepare();
    }
    const bool spun = fiber.state == Fiber::yields;
    running_ = &fiber;
    threadIdx = fiber.index;
    fiber.stack->enter();

    const unsigned bit = 1u << thread % warpSize;
    switch (fiber.state) {
      case Fiber::exited:
        free_stack(fiber);
        --alive_;
        warp.alive &= ~bit;
        release_block();
        for (unsigned lanes = warp.waiting; lanes != 0; lanes &= lanes - 1)
          release_warp(warp, __builtin_ctz(lanes));
        break;
      case Fiber::in_block_barrier:
        ++waiting_;
        release_block();
        break;
      case Fiber::in_warp_collective:
        warp.waiting |= bit;
        release_warp(warp, static_cast<int>(thread % warpSize));
        break;
      default:
        warp.yielded |= bit;
        return !spun;
    }
    return true;
  }

  void free_stack(Fiber& fiber) {
    auto& stacks = fresh_memory ? used_stacks : stacks_;
    if (stacks.size() < most_stacks) stacks.push_back(std::move(fiber.stack));
    fiber.stack.reset();
  }

  static bool same_place(const Fiber& a, const Fiber& b) {
    return a.operation == b.operation && a.at.line == b.at.line &&
           (a.at.file == b.at.file || std::strcmp(a.at.file, b.at.file) == 0);
  }

  // Lets the block go on if all threads that live are at one barrier.
  void release_block() {
    if (waiting_ == 0 || waiting_ != alive_) return;
    const Fiber* first = nullptr;
    uint64_t count = 0;
    for (const Fiber& fiber : fibers_) {
      if (fiber.state == Fiber::exited) continue;
      if (first == nullptr) first = &fiber;
      if (!same_place(*first, fiber)) return;
      count += fiber.value;
    }
    waiting_ = 0;
    for (Fiber& fiber : fibers_) fiber.value = count;
    synchronise(fibers_, [](const Fiber& fiber) { return fiber.state != Fiber::exited; });
    for (Warp& warp : warps_) warp.ready = warp.alive;
  }

  // Lets a lane and those of its mask go on if all that live are at one collective.
  void release_warp(Warp& warp, int lane) {
    Fiber* const lanes = &fibers_[static_cast<size_t>(&warp - warps_.data()) * warpSize];
    const Fiber& asking = lanes[lane];
    const unsigned members = asking.mask & warp.alive;
    if ((members & ~warp.waiting) != 0 || (members >> lane & 1) == 0) return;
    uint64_t values[warpSize], ballot = 0;
    for (int i = 0; i < warpSize; ++i) {
      values[i] = garbage;
      if ((members >> i & 1) == 0) continue;
      if (lanes[i].operation != asking.operation || lanes[i].mask != asking.mask) return;
      values[i] = lanes[i].value;
      ballot |= (values[i] & 1) << i;
    }
    for (int i = 0; i < warpSize; ++i) {
      if ((members >> i & 1) == 0) continue;
      lanes[i].value = lanes[i].source < 0 ? ballot : values[lanes[i].source];
    }
    // Votes and shuffles move values and order nothing else.
    if (fresh_memory && std::strcmp(asking.operation, "__syncwarp") == 0) {
      synchronise(fibers_, [&](const Fiber& fiber) {
        const auto i = &fiber - lanes;
        return i >= 0 && i < warpSize && (members >> i & 1) != 0;
      });
    }
    warp.waiting &= ~members;
    warp.ready |= members;
  }

  void report() {
    std::map<std::string, int> places;
    for (const Fiber& fiber : fibers_) {
      char place[512] = "exited";
      if (fiber.state == Fiber::yields) {
        std::snprintf(place, sizeof place, "spin in __nanosleep");
      } else if (fiber.state != Fiber::exited) {
        char mask[32] = "";
        if (fiber.state == Fiber::in_warp_collective)
          std::snprintf(mask, sizeof mask, " mask 0x%08x", fiber.mask);
        std::snprintf(place, sizeof place, "wait at %s%s (%s:%d, %s)", fiber.operation, mask,
                      fiber.at.file, fiber.at.line, fiber.at.function);
      }
      ++places[place];
    }
    std::string text;
    for (const auto& place : places)
      text += (text.empty() ? "" : "; ") + std::to_string(place.second) + " " + place.first;
    std::fprintf(stderr, "cuda emulation: deadlock in block (%u, %u, %u) of %zu threads: %s\n",
                 blockIdx.x, blockIdx.y, blockIdx.z, fibers_.size(), text.c_str());
    launch_->failed = true;
    abandon();
  }

  void abandon() {
    for (Fiber& fiber : fibers_) {
      if (!fiber.stack) continue;
      fiber.stack->abandon();
      if (!fresh_memory) free_stack(fiber);
      fiber.stack.reset();
    }
  }

  Launch* launch_ = nullptr;
  size_t number_ = 0;
  void* dynamic_ = nullptr;
  uint3 block_{};
  uint64_t random_ = 0;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  std::vector<std::unique_ptr<Stack>> stacks_;  // free ones
  Fiber* running_ = nullptr;
  size_t alive_ = 0, waiting_ = 0;  // of the block
};

void fiber_main() { current->fiber_main(); }

uint64_t environment(const char* name, uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text != nullptr && *text != '\0' ? std::strtoull(text, nullptr, 10) : otherwise;
}

thread_local cudaError_t last_error = cudaSuccess;

cudaError_t record(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

struct Capture {
  std::unique_ptr<Graph> graph;  // null: none is going on
  bool spoiled = false;
};
Capture capture;

// Whether a capture is going on; it is then worth nothing any more.
bool spoils_capture() {
  if (!capture.graph) return false;
  capture.spoiled = true;
  record(cudaErrorStreamCaptureUnsupported);
  return true;
}

// A device computes as IEEE says, whatever its host's mode is. Threads inherit it.
class DeviceMode {
 public:
  DeviceMode() {
    std::fegetenv(&host_);
    std::fesetenv(FE_DFL_ENV);
  }
  DeviceMode(const DeviceMode&) = delete;
  DeviceMode& operator=(const DeviceMode&) = delete;
  ~DeviceMode() { std::fesetenv(&host_); }

 private:
  std::fenv_t host_;
};

cudaError_t run_grid(const cudaLaunchConfig_t& config, const std::function<void()>& run) {
  static std::mutex one_at_a_time;
  std::lock_guard<std::mutex> lock(one_at_a_time);
  ++counters().launches;
  const DeviceMode mode;

  const uint64_t seed = environment("MMBAL_EMULATION_SEED", 0);
  const uint64_t blocks = uint64_t{config.gridDim.x} * config.gridDim.y * config.gridDim.z;
#if defined(MMBAL_EMULATION_ASAN) || defined(MMBAL_EMULATION_TSAN)
  const uint64_t workers = 1;  // under the former they would share `__shared__`
#else
  const uint64_t workers = std::min(
      {std::max<uint64_t>(environment("MMBAL_EMULATION_BLOCKS", 1), 1), blocks, uint64_t{64}});
#endif
  Launch state{config, run, seed, blocks, Order(seed, blocks), workers};
#ifdef MMBAL_EMULATION_TSAN
  while (state.next < blocks && !state.failed)
    std::thread([&state] { Worker().run(state, 0); }).join();
  __tsan_acquire(&state);
  for (auto& stack : used_stacks) {
    if (rested_stacks.size() < most_stacks) rested_stacks.push_back(std::move(stack));
  }
  used_stacks.clear();
#else
  static std::vector<std::unique_ptr<Worker>> pool;  // keeps the stacks
  while (pool.size() < workers) pool.push_back(std::make_unique<Worker>());
  std::vector<std::thread> threads;
  for (size_t i = 1; i < workers; ++i)
    threads.emplace_back([&state, i, worker = pool[i].get()] { worker->run(state, i); });
  pool[0]->run(state, 0);
  for (std::thread& thread : threads) thread.join();
#endif
  return record(state.failed ? cudaErrorLaunchFailure : cudaSuccess);
}

bool valid(const dim3& size, uint64_t x, uint64_t y, uint64_t z) {
  return size.x >= 1 && size.y >= 1 && size.z >= 1 && size.x <= x && size.y <= y && size.z <= z;
}

}  // namespace

int block_barrier(const char* operation, bool predicate, Location at) {
  Fiber& fiber = current->running();
  fiber.operation = operation;
  fiber.at = at;
  fiber.value = predicate;
  current->suspend(Fiber::in_block_barrier);
  return static_cast<int>(fiber.value);
}

uint64_t warp_collective(const char* operation, unsigned mask, uint64_t value, int source_lane,
                         Location at) {
  Fiber& fiber = current->running();
  fiber.operation = operation;
  fiber.at = at;
  fiber.mask = mask;
  fiber.value = value;
  fiber.source = source_lane;
  current->suspend(Fiber::in_warp_collective);
  return fiber.value;
}

void yield() { current->suspend(Fiber::yields); }
int lane() { return current->lane(); }
void* dynamic_shared() { return current->dynamic(); }

Counters& counters() {
  static Counters counters;
  return counters;
}

cudaError_t launch(const cudaLaunchConfig_t& config, size_t parameter_bytes,
                   std::function<void()> run) {
  constexpr size_t most_shared = 227 * 1024, most_parameters = 32764;
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  if (!valid(grid, 0x7fffffff, 65535, 65535) || !valid(block, 1024, 1024, 64) ||
      uint64_t{block.x} * block.y * block.z > 1024)
    return record(cudaErrorInvalidConfiguration);
  if (parameter_bytes > most_parameters || config.dynamicSmemBytes > most_shared)
    return record(cudaErrorInvalidValue);
  for (unsigned i = 0; i < config.numAttrs; ++i)
    if (config.attrs[i].id == cudaLaunchAttributeCooperative && config.attrs[i].val.cooperative)
      return record(cudaErrorNotSupported);
  if (capture.graph) {
    if (capture.spoiled) return record(cudaErrorStreamCaptureInvalidated);
    capture.graph->work.push_back([config, run] { return run_grid(config, run); });
    ++capture.graph->launches;
    return cudaSuccess;
  }
  return run_grid(config, run);
}

cudaError_t Graph::replay() const {
  for (const auto& run : work) {
    const cudaError_t error = run();
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

void begin_capture() { capture = {std::make_unique<Graph>(), false}; }

std::unique_ptr<Graph> end_capture() {
  Capture ended = std::exchange(capture, {});
  return ended.spoiled ? nullptr : std::move(ended.graph);
}

cudaError_t allocate(void** pointer, size_t bytes) {
  *pointer = nullptr;
  if (spoils_capture()) return cudaErrorStreamCaptureUnsupported;
  ++counters().allocations;
  if (bytes == 0) return cudaSuccess;
  if (posix_memalign(pointer, 256, bytes) != 0) return record(cudaErrorMemoryAllocation);
  std::memset(*pointer, 0xff, bytes);
  return cudaSuccess;
}

cudaError_t occupancy(int* blocks, int block_size) {
  if (block_size < 1 || block_size > 1024) return record(cudaErrorInvalidValue);
  *blocks = std::min(2048 / block_size, 32);
  return cudaSuccess;
}

}  // namespace emulation

using emulation::capture;
using emulation::counters;
using emulation::record;
using emulation::spoils_capture;

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
#define X(name, number, text) \
  case name:                  \
    return #name;
    MMBAL_CUDA_ERRORS(X)
#undef X
  }
  return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
#define X(name, number, text) \
  case name:                  \
    return text;
    MMBAL_CUDA_ERRORS(X)
#undef X
  }
  return "unrecognized error code";
}

cudaError_t cudaGetLastError() { return std::exchange(emulation::last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return emulation::last_error; }

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) { return cudaRuntimeGetVersion(version); }

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  return record(device == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return record(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = 48 * 1024;
      return cudaSuccess;
    case cudaDevAttrWarpSize:
      *value = warpSize;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = 4;
      return cudaSuccess;
    case cudaDevAttrL2CacheSize:
      *value = 256 << 10;  // small, so that few chunks are more than it holds
      return cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = 2048;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    case cudaDevAttrCooperativeLaunch:
      *value = 0;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = 227 * 1024;
      return cudaSuccess;
    case cudaDevAttrMemoryPoolsSupported:
      *value = 1;
      return cudaSuccess;
  }
  return record(cudaErrorInvalidValue);
}

cudaError_t cudaDeviceSynchronize() {
  if (spoils_capture()) return cudaErrorStreamCaptureUnsupported;
  ++counters().synchronisations;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaDeviceSynchronize(); }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = !capture.graph    ? cudaStreamCaptureStatusNone
            : capture.spoiled ? cudaStreamCaptureStatusInvalidated
                              : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}

cudaError_t cudaFree(void* pointer) {
  if (spoils_capture()) return cudaErrorStreamCaptureUnsupported;
  std::free(pointer);
  return pointer == nullptr ? cudaSuccess : cudaDeviceSynchronize();
}
cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) {
  if (spoils_capture()) return cudaErrorStreamCaptureUnsupported;
  std::free(pointer);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t) {
  if (spoils_capture()) return cudaErrorStreamCaptureUnsupported;
  counters().copies_to_host += kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDefault;
  if (bytes != 0) std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  const cudaError_t error = cudaMemcpyAsync(to, from, bytes, kind, nullptr);
  return error == cudaSuccess ? cudaDeviceSynchronize() : error;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  if (capture.spoiled) return record(cudaErrorStreamCaptureInvalidated);
  const auto run = [=] {
    if (bytes != 0) std::memset(to, value, bytes);
    return cudaSuccess;
  };
  if (!capture.graph) return run();
  capture.graph->work.push_back(run);
  return cudaSuccess;
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  if (spoils_capture()) return cudaErrorStreamCaptureUnsupported;
  return cudaMemsetAsync(to, value, bytes, nullptr);
}
