// Waiting: a gate holds a number that only grows. Who waits for it to change spins, because the
// other threads are nearly done or the next token comes soon; after PAUSING it offers its processor
// at each turn, for the awaited thread may have none; after SPINNING it sleeps on a condition
// variable. Where threads outnumber processors it offers from the start.
#include "pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

namespace endside {

static constexpr std::chrono::microseconds PAUSING{20}, SPINNING{1000};
static constexpr int PAUSES = 16;  // between two looks at the clock, which costs as much as one

static inline void pause_processor() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

namespace {

// A sleeper announces itself before it looks at the number for the last time, and who opens changes
// the number before looking for sleepers. Both in one total order, so no one sleeps through.
class alignas(64) Gate {
 public:
  uint32_t number() const { return number_.load(); }

  void open() {
    number_.fetch_add(1);
    if (sleepers_.load() == 0) return;
    { std::lock_guard<std::mutex> lock(mutex_); }
    changed_.notify_all();
  }

  void wait_past(uint32_t old, bool crowded) {
    if (spin_past(old, crowded)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    sleepers_.fetch_add(1);
    changed_.wait(lock, [&] { return number_.load() != old; });
    sleepers_.fetch_sub(1);
  }

 private:
  bool spin_past(uint32_t old, bool crowded) const {
    const auto started = std::chrono::steady_clock::now();
    std::chrono::steady_clock::duration spent{0};
    while (spent < SPINNING) {
      for (int i = 0; i < PAUSES; ++i) {
        if (number_.load() != old) return true;
        pause_processor();
      }
      if (crowded || spent > PAUSING) std::this_thread::yield();
      spent = std::chrono::steady_clock::now() - started;
    }
    return number_.load() != old;
  }

  std::atomic<uint32_t> number_{0};
  std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
};

}  // namespace

struct Pool::State {
  explicit State(int threads) : size(threads) {
    const unsigned processors = std::thread::hardware_concurrency();
    crowded = processors != 0 && static_cast<unsigned>(threads) > processors;
  }

  void barrier() {
    if (size == 1) {
      next.store(0, std::memory_order_relaxed);
      return;
    }
    const uint32_t old = passed.number();
    if (arrived.fetch_add(1) + 1 < size) return passed.wait_past(old, crowded);
    arrived.store(0);
    next.store(0);
    passed.open();
  }

  void call(Team& team) {
    try {
      (*work)(team);
    } catch (...) {
      std::lock_guard<std::mutex> lock(failing);
      if (!failure) failure = std::current_exception();
    }
    barrier();
  }

  const int size;
  bool crowded;
  Gate started, passed;
  alignas(64) std::atomic<int> arrived{0};
  alignas(64) std::atomic<int64_t> next{0};
  alignas(64) const std::function<void(Team&)>* work = nullptr;  // null ends the threads
  std::exception_ptr failure;
  std::mutex failing, running;
  std::vector<std::thread> threads;
};

namespace {

template <class State>
class Member final : public Team {
 public:
  Member(State& state, int rank) : state_(state), rank_(rank) {}
  int rank() const override { return rank_; }
  int size() const override { return state_.size; }
  void barrier() override { state_.barrier(); }
  int64_t take(int64_t step) override { return state_.next.fetch_add(step); }

 private:
  State& state_;
  const int rank_;
};

}  // namespace

Pool::Pool(int threads) {
  if (threads < 1) throw std::invalid_argument("a pool needs at least one thread");
  state_ = std::make_unique<State>(threads);
  State& state = *state_;
  const auto serve = [&state](int rank) {
    Member<State> member(state, rank);
    for (uint32_t seen = 0;; ++seen) {
      state.started.wait_past(seen, state.crowded);
      if (!state.work) return;
      state.call(member);
    }
  };
  try {
    for (int rank = 1; rank < threads; ++rank) state.threads.emplace_back(serve, rank);
  } catch (...) {
    stop();
    throw;
  }
}

Pool::~Pool() { stop(); }

void Pool::stop() {
  state_->work = nullptr;
  state_->started.open();
  for (std::thread& thread : state_->threads) thread.join();
}

int Pool::size() const { return state_->size; }

void Pool::run(const std::function<void(Team&)>& fn) {
  std::lock_guard<std::mutex> one_at_a_time(state_->running);
  state_->work = &fn;
  state_->started.open();
  Member<State> caller(*state_, 0);
  state_->call(caller);
  if (state_->failure) std::rethrow_exception(std::exchange(state_->failure, nullptr));
}

}  // namespace endside
