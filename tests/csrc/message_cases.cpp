// Point-to-point messages, connections made late, and ranks that wait for each other in a circle.
#include <algorithm>
#include <atomic>
#include <numeric>

#include "harness.h"
#include "messages.h"

namespace hybridcomm::test {
namespace {

constexpr uint64_t kSizes[] = {0, 1, 3000, 16384, 20000, 200001};

std::vector<float> content(int from, int to, uint64_t size, int round) {
  std::vector<float> out(size);
  std::iota(out.begin(), out.end(), static_cast<float>(from * 100 + to * 10 + round));
  return out;
}

Message half(bool send, int peer, uint32_t tag, std::vector<float>& data) {
  Message message;
  message.send = send;
  message.peer = peer;
  message.tag.tensor = tag;
  message.tag.numel = data.size();
  message.tag.collective = kMessageCollective;
  message.data = reinterpret_cast<std::byte*>(data.data());
  message.nbytes = data.size() * sizeof(float);
  return message;
}

// One message to or from a peer of another node, as a program; with `both` one each way.
std::shared_ptr<Program> one_message(uint64_t digest, int peer, bool send, uint64_t count) {
  auto program = std::make_shared<Program>();
  program->tag.digest = program->group = digest;
  program->tag.numel = count;
  program->stream_count = 1;
  Op op;
  op.kind = send ? Kind::send : Kind::receive;
  op.peer = peer;
  op.nbytes = count * sizeof(float);
  program->ops.push_back(op);
  return program;
}

Buffers buffers_of(std::vector<float>& values) {
  Buffers out;
  out.tensor = reinterpret_cast<std::byte*>(values.data());
  return out;
}

// An all-reduce of the whole job between messages: both go on.
void allreduce(const Layout& layout, int rank, Engine& engine, uint64_t digest) {
  const DenseAllreduce plan(layout, rank, 2, 64, digest);
  std::vector<float> values(plan.numel(), static_cast<float>(rank + 1));
  engine.run(plan.program(), buffers_of(values), kNobody);
  const auto want = static_cast<float>(layout.world() * (layout.world() + 1) / 2);
  check(std::all_of(values.begin(), values.end(), [want](float v) { return v == want; }),
        "an all-reduce beside messages");
}

// Messages of one tag that nobody has asked for yet.
void one_tag(const Layout& layout, int rank, Engine& engine) {
  const int next = (rank + 1) % layout.world(), before = (rank + layout.world() - 1) % layout.world();
  std::vector<std::vector<float>> out;
  std::vector<std::shared_ptr<Work>> works;
  for (int i = 0; i < 5; ++i) out.push_back(content(rank, next, 40, i));
  for (auto& values : out) works.push_back(engine.post({half(true, next, 77, values)}));
  for (const auto& work : works) work->wait(20);
  allreduce(layout, rank, engine, 99);
  for (int i = 0; i < 5; ++i) {
    std::vector<float> got(40, -1.0f);
    engine.exchange({half(false, before, 77, got)}, kNobody);
    check(got == content(before, rank, 40, i), "messages of one tag keep their order");
  }
}

// Who waits for the first works on both; behind that wait the second goes on.
void left_open(const Layout& layout, int rank, Engine& engine) {
  const int last = layout.world() - 1;
  std::vector<float> first(20000, -1.0f), second(20000, -1.0f);
  if (rank == 0) {
    const auto open = engine.post({half(false, last, 82, second)});
    engine.post({half(false, last, 81, first)})->wait(20, kNobody);
    check(open->wait(20), "a message goes on when a wait for another has ended");
    check(first == content(last, 0, 20000, 1) && second == content(last, 0, 20000, 2), "what was left open");
  } else if (rank == last) {
    first = content(last, 0, 20000, 1);
    second = content(last, 0, 20000, 2);
    engine.exchange({half(true, 0, 81, first)}, kNobody);
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    engine.exchange({half(true, 0, 82, second)}, kNobody);
  }
}

}  // namespace

// Every pair, every size; receives by two threads of a rank, some blocking, in another order than the sends.
void messages(const Layout& layout) {
  const auto body = [&](int rank, Engine& engine) {
    one_tag(layout, rank, engine);
    left_open(layout, rank, engine);
    for (int round = 0; round < 3; ++round) {
      std::vector<std::vector<float>> out;
      std::vector<std::shared_ptr<Work>> works;
      for (int peer = 0; peer < layout.world(); ++peer) {
        for (const uint64_t size : kSizes) out.push_back(content(rank, peer, size, round));
      }
      const auto receive = [&](int part) {
        for (int peer = layout.world() - 1; peer >= 0; --peer) {
          for (int i = 5 - part; peer != rank && i >= 0; i -= 2) {
            std::vector<float> got(kSizes[i], -1.0f);
            std::vector<Message> messages{half(false, peer, static_cast<uint32_t>(i), got)};
            if ((peer + i) % 2 == 0) {
              engine.exchange(std::move(messages), kNobody);
            } else {
              engine.post(std::move(messages))->wait(20, kNobody);
            }
            check(got == content(peer, rank, kSizes[i], round), "message " + std::to_string(i) + " of rank " +
                                                                    std::to_string(peer) + " to rank " +
                                                                    std::to_string(rank));
          }
        }
      };
      for (int peer = 0; peer < layout.world(); ++peer) {
        for (uint32_t i = 0; peer != rank && i < 6; ++i) {
          works.push_back(engine.post({half(true, peer, i, out[static_cast<size_t>(peer) * 6 + i])}));
        }
      }
      std::thread other([&] { receive(1); });
      allreduce(layout, rank, engine, static_cast<uint64_t>(round) + 1);
      receive(0);
      other.join();
      for (const auto& work : works) work->wait(20, kNobody);
      for (auto& values : out)
        std::fill(values.begin(), values.end(), -7.0f);  // whoever reads them now is wrong
    }
  };
  with_ranks(layout, body);
}

// A collective may fill all its slots for a peer that takes part only once it has a message.
void messages_beside_full_slots(const Layout& layout) {
  if (layout.per_node == 1) return;
  const auto body = [&](int rank, Engine& engine) {
    const DenseAllreduce plan(layout, rank, 40, 64, 1);
    std::vector<float> values(plan.numel(), static_cast<float>(rank + 1)), got(3000, -1.0f);
    std::vector<float> sent = content(0, 1, got.size(), 0);
    std::shared_ptr<Work> begun;
    if (rank == 0) {
      begun = engine.submit(plan.program(), buffers_of(values));
      while (engine.counters().shm_bytes.load() == 0) std::this_thread::yield();
      engine.exchange({half(true, 1, 0, sent)}, kNobody);
      begun->wait(20, kNobody);
    }
    if (rank == 1) {
      engine.exchange({half(false, 0, 0, got)}, kNobody);
      check(got == sent, "a message beside a collective that has begun");
    }
    if (rank != 0) engine.run(plan.program(), buffers_of(values), kNobody);
    const auto want = static_cast<float>(layout.world() * (layout.world() + 1) / 2);
    check(std::all_of(values.begin(), values.end(), [want](float v) { return v == want; }), "and its sum");
  };
  with_ranks(layout, body, 5);
}

// Works that are open when a rank gives up end too, on both sides.
void messages_abandoned(const Layout& layout) {
  std::atomic<int> done{0};
  with_ranks(layout, [&](int rank, Engine& engine) {
    std::vector<float> long_one(100000), none(4);
    const int peer = (rank + 1) % layout.world(), from = (rank + layout.world() - 1) % layout.world();
    const auto sent = engine.post({half(true, peer, 1, long_one)});
    const auto got = engine.post({half(false, from, 2, none)});
    allreduce(layout, rank, engine, 5);
    // Bad news travels faster than data: it may overtake the end of a slower rank's good call.
    for (++done; done.load() < layout.world();) std::this_thread::yield();
    if (rank == 0) engine.abort();
    for (const auto& work : {sent, got}) {
      const auto code = code_of([&] { work->wait(20, kNobody); });
      check(code == Code::aborted, "an open message of rank " + std::to_string(rank) + " ends with an abort");
    }
  });
}

// What becomes of a long message's sender whose peer gives these answers, all before the first is looked at.
std::optional<Code> outcome(const std::vector<FrameKind>& answers) {
  const Layout layout{1, 2};
  const std::string name = next_job();
  const Listeners listeners = listeners_of(layout);
  std::atomic<bool> answered{false}, over{false};
  std::thread receiver([&] {
    Mesh mesh(config_of(layout, 1, listeners, name), *listeners[1]);
    Node node(mesh, false);
    const Descriptor* announced = nullptr;
    while (announced == nullptr) announced = node.next(Lane::message, 0);
    MessageFrame answer;
    answer.id = announced->id;
    node.take(Lane::message, 0);
    for (const FrameKind kind : answers) {
      answer.kind = kind;
      check(node.post_frame(0, answer, {Place::slot, 0}, nullptr), "room for an answer");
    }
    answered = true;
    while (!over) std::this_thread::yield();
  });
  Mesh mesh(config_of(layout, 0, listeners, name), *listeners[0]);
  Node node(mesh, false);
  WireCounters counters;
  Messages messages(mesh, node, counters);
  messages.on_finished([](const std::shared_ptr<void>&) {});
  std::vector<float> data = content(0, 1, 20000, 0);
  messages.submit({half(true, 1, 1, data)}, nullptr);
  messages.progress();
  while (!answered) std::this_thread::yield();
  const auto code = code_of([&] { messages.progress(); });
  over = true;
  receiver.join();
  return code;
}

// Sent twice, or complete while its data is on its way: neither may be asked for.
void wrong_answers(const Layout& layout) {
  if (layout.nodes != 1) return;
  check(!outcome({FrameKind::go}) && !outcome({FrameKind::taken}), "a message is asked for, or taken");
  check(outcome({FrameKind::go, FrameKind::go}) == Code::mismatch, "a second go is refused");
  check(outcome({FrameKind::go, FrameKind::taken}) == Code::mismatch, "taken is refused after go");
  check(outcome({FrameKind::taken, FrameKind::taken}) == Code::mismatch, "taken twice is refused");
}

// Ranks that are not connected from the start, all at once and in contrary orders.
void crosswise(const Layout& layout) {
  if (layout.nodes != 2 || layout.per_node != 2) return;
  with_ranks(layout, [&](int rank, Engine& engine) {
    const int peer = 3 - rank;  // 0 and 3, 1 and 2: no usual links
    std::vector<float> out = content(rank, peer, 5000, 1), got(5000, -1.0f);
    const auto digest = [](int from) { return static_cast<uint64_t>(from + 1); };
    const auto send = engine.submit(one_message(digest(rank), peer, true, 5000), buffers_of(out));
    const auto receive = engine.submit(one_message(digest(peer), peer, false, 5000), buffers_of(got));
    send->wait(20, kNobody);
    receive->wait(20, kNobody);
    check(got == content(peer, rank, 5000, 1), "a message over a link made late");
    allreduce(layout, rank, engine, 9);
  });
}

// a: ab, ca  b: bc, ab  c: ca, bc: nobody gets a wrong message, nobody gets any.
void circle(const Layout& layout) {
  if (layout.world() != 3) return;
  const auto body = [&](int rank, Engine& engine) {
    // Only lowered collectives can be run inside a node, so each pair sums one chunk in a ring of its own.
    const auto pair = [rank](int owner, int other) {
      auto program = std::make_shared<Program>();
      program->tag.digest = program->group = static_cast<uint64_t>(owner + 1);
      program->tag.numel = 16;
      program->stream_count = 2;
      Op share, collect;
      share.kind = Kind::share;
      collect.kind = Kind::collect;
      share.count = collect.count = 16;
      share.sources = collect.sources = {owner, other};
      collect.stream = 1;
      collect.after = {0};
      program->ops = {share, collect};
      return program;
    };
    std::vector<float> first(16, 1.0f), second(16, 1.0f);
    const int next = (rank + 1) % 3, before = (rank + 2) % 3;
    const auto begin = Clock::now();
    const auto one = engine.submit(pair(rank, next), buffers_of(first));
    const auto two = engine.submit(pair(before, rank), buffers_of(second));
    for (const auto& work : {one, two}) {
      check(code_of([&] { work->wait(20, kNobody); }) == Code::mismatch,
            "a circle of waiting ranks is found");
    }
    check(Clock::now() - begin < seconds(10), "long before the timeout");
  };
  with_ranks(layout, body);
}

}  // namespace hybridcomm::test
