// Ranks that are threads, each with an engine of its own.
#pragma once

#include <atomic>
#include <cstdio>
#include <functional>
#include <mutex>
#include <thread>

#include "programs.h"

namespace hybridcomm::test {

inline int failures = 0;
inline std::mutex report;

inline void check(bool good, const std::string& what) {
  if (good) return;
  const std::lock_guard<std::mutex> lock(report);
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  ++failures;
}

// The outcome of a call, as an error code; `expected` runs that should raise.
inline std::optional<Code> code_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.code;
  }
  return std::nullopt;
}

using Body = std::function<void(int rank, Engine& engine)>;

using Listeners = std::vector<std::unique_ptr<Listener>>;

inline Listeners listeners_of(const Layout& layout) {
  Listeners out;
  for (int rank = 0; rank < layout.world(); ++rank) out.push_back(std::make_unique<Listener>("127.0.0.1", 0));
  return out;
}

inline std::string next_job() {
  static std::atomic<int> job{0};
  return "hybridcomm-engine-test-" + std::to_string(::getpid()) + "-" + std::to_string(job++);
}

inline MeshConfig config_of(const Layout& layout, int rank, const Listeners& listeners,
                            const std::string& name) {
  MeshConfig config;
  config.rank = rank;
  config.name = name;
  config.slot_nbytes = 4096;
  config.timeout_s = 20;
  config.token[0] = 7;
  const int node = rank / layout.per_node;
  for (int i = 0; i < layout.per_node; ++i) config.local_ranks.push_back(node * layout.per_node + i);
  for (int other = 0; other < layout.nodes; ++other) {
    if (other == node) continue;
    for (int local = 0; local < layout.per_node; ++local) {
      const int peer = other * layout.per_node + local;
      auto& list = local == rank % layout.per_node ? config.remote_peers : config.others;
      list.push_back({peer, "127.0.0.1", listeners[static_cast<size_t>(peer)]->port()});
    }
  }
  return config;
}

inline void with_ranks(const Layout& layout, const Body& body, double timeout_s = 20,
                       size_t slot_nbytes = 4096) {
  const std::string name = next_job();
  const Listeners listeners = listeners_of(layout);
  const auto run = [&](int rank) {
    try {
      MeshConfig config = config_of(layout, rank, listeners, name);
      config.slot_nbytes = slot_nbytes;
      config.timeout_s = timeout_s;
      const auto engine = std::make_shared<Engine>(config, *listeners[static_cast<size_t>(rank)], true);
      body(rank, *engine);
      engine->close();
    } catch (const std::exception& error) {
      check(false, "rank " + std::to_string(rank) + ": " + error.what());
    }
  };
  std::vector<std::thread> threads;
  for (int rank = 0; rank < layout.world(); ++rank) threads.emplace_back(run, rank);
  for (auto& thread : threads) thread.join();
}

inline const std::function<void()> kNobody;

// The cases of message_cases.cpp.
void messages(const Layout& layout);
void messages_beside_full_slots(const Layout& layout);
void messages_abandoned(const Layout& layout);
void wrong_answers(const Layout& layout);
void crosswise(const Layout& layout);
void circle(const Layout& layout);

}  // namespace hybridcomm::test
