// The team: every thread arrives, what was written before a barrier is seen after it, shared-out
// work is done once, errors come back; also with more threads than the machine has processors.
#include "pool.h"

#include <atomic>
#include <stdexcept>
#include <thread>

#include "check.h"

using endside::Pool;
using endside::Team;

static const int TEAMS[] = {1, 2, 3, 8, 33};

TEST(pool_ranks) {
  for (int threads : TEAMS) {
    Pool pool(threads);
    CHECK(pool.size() == threads);
    std::vector<int> seen(threads, 0);
    pool.run([&](Team& team) { seen[team.rank()] += team.size(); });
    for (int count : seen) CHECK(count == threads, threads);
  }
  CHECK_THROWS(std::invalid_argument, Pool(0));
  CHECK_THROWS(std::invalid_argument, Pool(-1));
}

// Plain (not atomic) memory, rewritten by another thread each round: the thread sanitizer sees a
// race if a barrier orders too little, the sums are wrong if it lets someone pass early.
TEST(pool_barrier) {
  for (int threads : TEAMS) {
    const int rounds = threads > 8 ? 60 : 400;
    Pool pool(threads);
    std::vector<int64_t> cell(threads, 0), wrong(threads, 0);
    pool.run([&](Team& team) {
      for (int round = 0; round < rounds; ++round) {
        cell[(team.rank() + round) % threads] = round + 1;
        team.barrier();
        int64_t sum = 0;
        for (int64_t value : cell) sum += value;
        wrong[team.rank()] += sum != int64_t{threads} * (round + 1);
        team.barrier();
      }
    });
    for (int64_t count : wrong) CHECK(count == 0, "threads", threads, "bad rounds", count);
  }
}

TEST(pool_each) {
  for (int threads : TEAMS) {
    Pool pool(threads);
    for (int64_t count : {0, 1, 2, 7, 64, 1000}) {
      std::vector<int> first(count, 0), second(count, 0);
      pool.run([&](Team& team) {
        team.each(count, [&](int64_t index) { first[index] += 1; });
        // Without the barrier in between, this would read what is not yet written.
        team.each(count, [&](int64_t index) {
          second[count - 1 - index] += first[count - 1 - index];
        });
      });
      for (int value : second) CHECK(value == 1, "threads", threads, "count", count);
    }
  }
}

TEST(pool_take) {
  Pool pool(3);
  std::vector<int> done(100, 0);
  pool.run([&](Team& team) {
    for (int64_t begin = team.take(7); begin < 100; begin = team.take(7)) {
      for (int64_t i = begin; i < begin + 7 && i < 100; ++i) done[i] += 1;
    }
    team.barrier();
    if (team.rank() == 1) done[team.take(1)] += 1;  // the barrier has set the counter back to 0
    team.barrier();
  });
  CHECK(done[0] == 2);
  for (int i = 1; i < 100; ++i) CHECK(done[i] == 1, i);
}

TEST(pool_split) {
  for (int threads : TEAMS) {
    Pool pool(threads);
    for (int64_t count : {0, 1, 15, 16, 17, 31, 129, 1000}) {
      for (int64_t unit : {1, 8, 16}) {
        std::vector<int> done(count, 0);
        std::vector<int64_t> begins(threads, 0), calls(threads, 0);
        pool.run([&](Team& team) {
          team.split(count, unit, [&](int64_t begin, int64_t end) {
            begins[team.rank()] = begin;
            calls[team.rank()] += 1;
            for (int64_t i = begin; i < end; ++i) done[i] += 1;
          });
        });
        for (int value : done) CHECK(value == 1, "threads", threads, "count", count, unit);
        for (int64_t begin : begins) CHECK(begin % unit == 0);
        for (int64_t called : calls) CHECK(called <= 1);
      }
    }
  }
}

// A whole step's worth of meetings, many times, with pauses long enough for the others to sleep.
TEST(pool_many_steps) {
  for (int threads : {2, 5}) {
    Pool pool(threads);
    std::vector<int64_t> total(threads, 0);
    for (int step = 0; step < 60; ++step) {
      if (step % 20 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(3));
      pool.run([&](Team& team) {
        for (int layer = 0; layer < 5; ++layer) {
          team.each(11, [&](int64_t) { total[team.rank()] += 1; });
          team.split(11, 1, [&](int64_t begin, int64_t end) { total[team.rank()] += end - begin; });
          team.barrier();
        }
      });
    }
    int64_t sum = 0;
    for (int64_t value : total) sum += value;
    CHECK(sum == 60 * 5 * 22, threads, sum);
  }
}

TEST(pool_a_late_thread_is_awaited) {
  Pool pool(3);
  int value = 0, seen[3] = {};
  pool.run([&](Team& team) {
    if (team.rank() == 2) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));  // long enough to sleep
      value = 7;
    }
    team.barrier();
    seen[team.rank()] = value;
  });
  for (int got : seen) CHECK(got == 7);
}

TEST(pool_errors) {
  for (int threads : TEAMS) {
    Pool pool(threads);
    const auto thrower = [&](int rank) {
      return [rank](Team& team) {
        if (rank < 0 || team.rank() == rank) throw std::range_error("from a thread");
      };
    };
    for (int rank : {-1, 0, threads - 1}) {
      CHECK_THROWS(std::range_error, pool.run(thrower(rank)));
      std::atomic<int> ran{0};
      pool.run([&](Team&) { ran.fetch_add(1); });  // the pool lives on, and the error is gone
      CHECK(ran == threads, threads, rank);
    }
  }
}

TEST(pool_beside_pool) {
  std::vector<std::thread> callers;
  std::atomic<int64_t> sum{0};
  for (int caller = 0; caller < 3; ++caller) {
    callers.emplace_back([&] {
      Pool pool(2);
      for (int step = 0; step < 20; ++step) {
        pool.run([&](Team& team) { team.each(10, [&](int64_t index) { sum += index; }); });
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK(sum == 3 * 20 * 45);
}

TEST(pool_without_work) {
  for (int threads : TEAMS) Pool pool(threads);
}
