// A persistent team of threads that runs one step of the model together.
//
// A step is single program, multiple data: `Pool::run` calls the same function on every thread, and
// the function meets its neighbours at barriers. So a decode step of 24 layers costs about a
// hundred short spins and no wake-ups. Between steps threads spin a moment, then sleep.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

namespace endside {

// What one thread knows of its team while `run` lasts. All threads must make the same sequence of
// calls to `barrier`, `each` and `split` with the same arguments.
class Team {
 public:
  virtual ~Team() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  // Returns when every thread has arrived; what they wrote before is visible after.
  virtual void barrier() = 0;
  // The next index of a shared counter that starts at 0; `each` uses it. Private to the team.
  virtual int64_t take(int64_t step) = 0;

  // fn(index) for 0 <= index < count, handed out one by one to whoever is free; ends in a barrier.
  template <class F>
  void each(int64_t count, F&& fn) {
    for (int64_t index = take(1); index < count; index = take(1)) fn(index);
    barrier();  // also sets the counter of `take` back to 0
  }
  // fn(begin, end) once with this thread's share of 0 .. count in units of `unit`; no barrier.
  template <class F>
  void split(int64_t count, int64_t unit, F&& fn) const {
    const int64_t units = (count + unit - 1) / unit;
    const int64_t begin = units * rank() / size() * unit;
    const int64_t end = units * (rank() + 1) / size() * unit;
    if (begin < end) fn(begin, end < count ? end : count);
  }
};

class Pool {
 public:
  // `threads` >= 1; the calling thread is rank 0, so threads - 1 are started.
  explicit Pool(int threads);
  ~Pool();
  int size() const;
  // Calls fn(team) on every thread and returns when all are done. An exception thrown by fn on any
  // thread is rethrown here once (fn must not throw between barriers others wait at).
  void run(const std::function<void(Team&)>& fn);

 private:
  struct State;
  void stop();
  std::unique_ptr<State> state_;
};

}  // namespace endside
