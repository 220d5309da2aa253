// Runs the engine under sanitizers: ranks are threads, each with its own mesh, and no Python is near.
//
// Every case ends or the watchdog ends the process. Exit code 0: all cases passed.

#include <algorithm>
#include <cstdlib>

#include "harness.h"

namespace hybridcomm::test {
namespace {

struct Call {
  DenseAllreduce plan;
  std::vector<float> values;
  int rank, number;

  Call(const Layout& layout, int rank, int number, uint64_t digest = 0)
      : plan(layout, rank, 1 + number % 7, 64 * (1 + static_cast<uint64_t>(number) % 3),
             digest + 1 + number % 21),
        values(plan.numel()),
        rank(rank),
        number(number) {
    for (size_t i = 0; i < values.size(); ++i) values[i] = value(rank, i);
  }
  float value(int from, size_t i) const {
    return static_cast<float>((from + 1) * 1000 + number + static_cast<int>(i % 97));
  }
  Buffers buffers() {
    Buffers out;
    out.tensor = reinterpret_cast<std::byte*>(values.data());
    return out;
  }
  void verify(int world) const {
    for (size_t i = 0; i < values.size(); ++i) {
      float want = 0;
      for (int from = 0; from < world; ++from) want += value(from, i);
      if (values[i] != want) {
        check(false, "call " + std::to_string(number) + " rank " + std::to_string(rank) + " element " +
                         std::to_string(i) + ": " + std::to_string(values[i]) +
                         " != " + std::to_string(want));
        return;
      }
    }
  }
};

void blocking(const Layout& layout) {
  with_ranks(layout, [&](int rank, Engine& engine) {
    for (int number = 0; number < 40; ++number) {
      Call call(layout, rank, number);
      engine.run(call.plan.program(), call.buffers(), kNobody);
      call.verify(layout.world());
    }
  });
}

void mixed(const Layout& layout) {
  with_ranks(layout, [&](int rank, Engine& engine) {
    std::vector<std::unique_ptr<Call>> calls;
    std::vector<std::shared_ptr<Work>> works;
    for (int number = 0; number < 60; ++number) {
      calls.push_back(std::make_unique<Call>(layout, rank, number));
      Call& call = *calls.back();
      if (number % 4 == 3) {
        engine.run(call.plan.program(), call.buffers(), kNobody);
        call.verify(layout.world());
      } else {
        works.push_back(engine.submit(call.plan.program(), call.buffers()));
      }
      if (number % 5 == 0) {  // properties of a running work may be read at any time
        const Work& last =
            *(works.empty() ? engine.submit(call.plan.program(), call.buffers()) : works.back());
        check(last.seconds() >= 0 && last.wire_nbytes() < (1u << 30), "properties of a running work");
      }
      if (number % 11 == 10) works.erase(works.begin());  // dropped un-waited
    }
    for (auto work = works.rbegin(); work != works.rend(); ++work) (*work)->wait(20);
    engine.close();  // before the buffers go
    for (const auto& call : calls) call->verify(layout.world());
  });
}

// Long messages are pointed to, in private memory and in the arena, ranks and calls mixed; tensors are spoilt as
// soon as a call returns, so that whoever still reads them gets a wrong sum.
void references(const Layout& layout) {
  constexpr uint64_t kCount = 16384;  // 64 KiB
  const auto body = [&](int rank, Engine& engine) {
    for (int number = 0; number < 12; ++number) {
      const DenseAllreduce plan(layout, rank, 3, kCount, 77);
      std::vector<float> own(plan.numel());
      const auto& arena = engine.node().arena();
      std::unique_ptr<Arena::Block> block;
      if (arena && (rank + number) % 2 == 0) block = arena->allocate(plan.numel() * sizeof(float));
      float* values = block ? reinterpret_cast<float*>(block->data()) : own.data();
      const auto value = [number](int from, size_t i) {
        return static_cast<float>((from + 1) * 1000 + number + static_cast<int>(i % 97));
      };
      for (size_t i = 0; i < plan.numel(); ++i) values[i] = value(rank, i);
      Buffers buffers;
      buffers.tensor = reinterpret_cast<std::byte*>(values);
      engine.run(plan.program(), buffers, kNobody);
      bool good = true;
      for (size_t i = 0; i < plan.numel(); ++i) {
        float want = 0;
        for (int from = 0; from < layout.world(); ++from) want += value(from, i);
        good = good && values[i] == want;
        values[i] = -1;
      }
      check(good, "references, call " + std::to_string(number) + ", rank " + std::to_string(rank));
    }
  };
  with_ranks(layout, body, 20, kCount * sizeof(float));
}

// A rank that was interrupted may do with its tensor what it likes: who comes late neither reads nor writes it.
void withdrawn(const Layout& layout) {
  if (layout.nodes > 1) return;
  constexpr uint64_t kCount = 16384;
  std::atomic<int> late{0};
  const auto body = [&](int rank, Engine& engine) {
    const DenseAllreduce plan(layout, rank, 3, kCount, 78);
    std::vector<float> values(plan.numel(), 1.0f);
    Buffers buffers;
    buffers.tensor = reinterpret_cast<std::byte*>(values.data());
    if (rank == 0) {
      const auto interrupt = [] { throw std::runtime_error("interrupted"); };
      try {
        engine.run(plan.program(), buffers, interrupt);
        check(false, "the call of rank 0 is interrupted");
      } catch (const std::runtime_error&) {
      }
      std::fill(values.begin(), values.end(), 7.0f);
      while (late.load() < layout.world() - 1) std::this_thread::sleep_for(std::chrono::milliseconds(5));
      check(std::all_of(values.begin(), values.end(), [](float v) { return v == 7.0f; }),
            "nobody writes what rank 0 has withdrawn");
      return;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
    const auto code = code_of([&] { engine.run(plan.program(), buffers, kNobody); });
    check(code == Code::aborted, "rank " + std::to_string(rank) + " learns that rank 0 was interrupted");
    ++late;
  };
  with_ranks(layout, body, 20, kCount * sizeof(float));
}

void mismatch(const Layout& layout) {
  std::atomic<int> done{0};
  with_ranks(layout, [&](int rank, Engine& engine) {
    Call good(layout, rank, 3);
    engine.run(good.plan.program(), good.buffers(), kNobody);
    // Bad news travels faster than data: it may overtake the end of a slower rank's good call.
    for (++done; done.load() < layout.world();) std::this_thread::yield();
    Call call(layout, rank, 5, rank == 0 ? 1000 : 0);
    const auto code = code_of([&] { engine.run(call.plan.program(), call.buffers(), kNobody); });
    check(code == Code::mismatch, "a mismatch on rank " + std::to_string(rank));
    const auto later = code_of([&] { engine.submit(call.plan.program(), call.buffers())->wait(20); });
    check(later == Code::mismatch, "later calls raise the same");
  });
}

void aborted(const Layout& layout) {
  with_ranks(layout, [&](int rank, Engine& engine) {
    Call call(layout, rank, 1);
    if (rank == 0) {
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      engine.abort();
      return;
    }
    std::thread other;
    if (rank == 1) other = std::thread([&] { engine.abort(); });
    const auto code = code_of([&] { engine.submit(call.plan.program(), call.buffers())->wait(20); });
    check(code == Code::aborted, "an abort reaches rank " + std::to_string(rank));
    if (other.joinable()) other.join();
  });
}

// Another thread listens all the time: beside calls of all kinds to no effect, and when `last` gives up in the end, to
// hear of it, of the right rank, on ranks that call nothing more. Each then gives up itself, which takes no blame.
void listened(const Layout& layout, int last) {
  with_ranks(layout, [&](int rank, Engine& engine) {
    std::optional<Error> heard;
    std::thread listener([&] {
      const auto until = Clock::now() + std::chrono::seconds(10);
      while (!heard && Clock::now() < until) {
        heard = engine.listen();
        std::this_thread::sleep_for(std::chrono::milliseconds(rank == (last + 1) % layout.world() ? 30 : 1));
      }
      engine.abort();
    });
    for (int number = 0; number < 20; ++number) {
      Call call(layout, rank, number);
      if (number % 2 == 0) engine.run(call.plan.program(), call.buffers(), kNobody);
      if (number % 2 == 1) engine.submit(call.plan.program(), call.buffers())->wait(20);
      call.verify(layout.world());
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(50));  // the others are out of their calls, too
    if (rank == last) engine.abort();
    listener.join();
    const bool right = heard && heard->code == Code::aborted && heard->rank == last;
    check(right, "rank " + std::to_string(rank) + " hears that rank " + std::to_string(last) +
                     " gives up, not: " + (heard ? heard->what() : "nothing"));
  });
}

void listening(const Layout& layout) {
  for (int last = 0; last < layout.world(); ++last) listened(layout, last);
}

void left(const Layout& layout) {
  with_ranks(layout, [&](int rank, Engine& engine) {
    if (rank == 0) return;
    Call call(layout, rank, 6);
    const auto code = code_of([&] { engine.run(call.plan.program(), call.buffers(), kNobody); });
    check(code == Code::peer_lost, "rank " + std::to_string(rank) + " learns that rank 0 left");
  });
}

void stalled(const Layout& layout) {
  with_ranks(
      layout,
      [&](int rank, Engine& engine) {
        if (rank == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2700));
        Call call(layout, rank, 6);
        const auto code = code_of([&] { engine.run(call.plan.program(), call.buffers(), kNobody); });
        check(code == Code::stall, "rank " + std::to_string(rank) + " learns that rank 0 stalls");
      },
      0.5);
}

void concurrent_close(const Layout& layout) {
  with_ranks(layout, [&](int rank, Engine& engine) {
    Call call(layout, rank, 2);
    const auto work = engine.submit(call.plan.program(), call.buffers());
    std::thread closer([&] { engine.close(); });
    std::thread reader([&] { check(engine.counters().tx_bytes.load() < (1u << 30), "counters"); });
    work->wait(20);
    closer.join();
    reader.join();
    call.verify(layout.world());
  });
}

}  // namespace
}  // namespace hybridcomm::test

int main() {
  using namespace hybridcomm::test;
  ::alarm(100);  // a hang is a failure
  for (const Layout layout : {Layout{2, 2}, Layout{1, 3}, Layout{2, 1}}) {
    for (const auto test : {blocking, mixed, references, withdrawn, mismatch, aborted, listening, left,
                            stalled, concurrent_close, messages, messages_beside_full_slots,
                            messages_abandoned, wrong_answers, crosswise, circle})
      test(layout);
  }
  std::printf("%d failures\n", failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
